"""What a text is to be made from: prompts, lengths, stop tokens, settings and keys, checked and padded."""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from effjax.models import SequenceModel
from effjax.serving.prompts import TokenIds, bucket, check_ids, check_prompt, pad
from effjax.serving.sampling import Sampling, Settings

# In place of a token where a row has none.
NO_TOKEN = -1

# For a loop that leaves it to its caller to see where a text ends.
NO_STOPS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a loop that makes texts, as arrays.

    Attributes:
      prompts: [B, T] token ids, padding behind them.
      lengths: [B] tokens of each prompt.
      keys: [B] random keys.
      settings: how tokens are drawn.
      stop_tokens: [S] ids that end a row, and `NO_TOKEN`.
      max_length: room that a row needs, padded as prompts are.
    """

    prompts: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    keys: Key[Array, " B"]
    settings: Settings
    stop_tokens: Int[np.ndarray, " S"]
    max_length: int

    @classmethod
    def of(
        cls,
        models: Sequence[SequenceModel],
        prompts: Sequence[TokenIds],
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Collection[int],
        key: Key[Array, "..."] | None,
    ) -> "Inputs":
        """Checks and pads.

        Args:
          models: those that read the texts, of one vocabulary.
          prompts: token ids of each prompt.
          max_new_tokens: most tokens that a row gets.
          sampling: how they are drawn.
          stop_tokens: ids that end a row.
          key: for row b it is folded with b; or a key for each row, [B]. None is `jax.random.key(0)`.

        Raises:
          ValueError: for prompts, ids or a key that are not valid, or more tokens than a model's `max_seq_len`.
        """
        vocab_size = models[0].vocab_size
        checked = [check_prompt(f"prompts[{i}]", p, vocab_size) for i, p in enumerate(prompts)]
        if not checked:
            raise ValueError("prompts is empty; valid: at least one prompt")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}; valid: at least 1")
        longest = max(map(len, checked))
        limit = min(model.max_seq_len for model in models)
        if longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens}; "
                f"valid: at most max_seq_len={limit} together"
            )
        padded, lengths = pad(checked, limit)
        stops = check_ids("stop_tokens", np.array(sorted(stop_tokens), np.int64), vocab_size)
        return cls(
            prompts=padded,
            lengths=lengths,
            keys=_keys_of_rows(key, len(checked)),
            settings=sampling.settings(),
            stop_tokens=np.pad(
                stops, (0, bucket(len(stops)) - len(stops)), constant_values=NO_TOKEN
            ),
            max_length=min(bucket(longest + max_new_tokens), limit),
        )


def _keys_of_rows(key: Key[Array, "..."] | None, num_rows: int) -> Key[Array, " B"]:
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (num_rows,)):
        raise ValueError(
            f"key is {key.dtype}{list(key.shape)}; valid: a key of jax.random.key, or one for each of {num_rows} rows"
        )
    if key.shape:
        return jnp.copy(key)  # the caches that it goes with are given away to be written in place
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_rows))
