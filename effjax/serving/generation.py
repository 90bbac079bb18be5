"""Text from prompts: all of it at once, or token by token as it comes."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from effjax.models import SequenceModel
from effjax.serving import decoding
from effjax.serving.decoding import Programs, Rows
from effjax.serving.inputs import NO_TOKEN, Inputs
from effjax.serving.programs import compiled
from effjax.serving.prompts import TokenIds, bucket
from effjax.serving.sampling import PLAIN, Sampling, Settings


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came after each prompt.

    Attributes:
      tokens: [B, N] the new tokens, the one that stopped the row included; behind them `NO_TOKEN`.
      logprobs: [B, N] log-probability of each (natural) under the model, before temperature and filters; 0 behind them.
      lengths: [B] new tokens of each row.
      stopped: [B] whether a stop token ended the row; if not, it has all the tokens that were asked for.
    """

    tokens: Int[np.ndarray, "B N"]
    logprobs: Float[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    stopped: Bool[np.ndarray, " B"]

    def completions(self) -> list[Int[np.ndarray, " n"]]:
        """The new tokens of each row."""
        return [row[:n] for row, n in zip(self.tokens, self.lengths, strict=True)]


@dataclasses.dataclass(frozen=True)
class Step:
    """One more token of each row.

    Attributes:
      tokens: [B] the tokens; `NO_TOKEN` in rows that had stopped before.
      logprobs: [B] their log-probabilities, as in `Generation`.
      stopped: [B] which rows have stopped.
    """

    tokens: Int[np.ndarray, " B"]
    logprobs: Float[np.ndarray, " B"]
    stopped: Bool[np.ndarray, " B"]


def generate(
    model: SequenceModel,
    variables: Any,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    *,
    sampling: Sampling = PLAIN,
    stop_tokens: Collection[int] = (),
    key: Key[Array, "..."] | None = None,
) -> Generation:
    """Continues prompts, which may differ in length, as one batch.

    Prompts are read in parallel and tokens drawn in one compiled loop, which ends when every row has stopped. Programs
    are compiled for a model, a number of rows, and lengths up to the next power of two; values of the sampling may
    change without a new one. A row's tokens depend on its prompt and its key alone, and are those of `stream`.

    Args:
      model: a model whose mixers are causal and whose head scores the vocabulary. A mixture of experts is run without
        dropping tokens (`decoding.served`).
      variables: its variables.
      prompts: token ids of each prompt, at least one.
      max_new_tokens: most tokens that a row gets.
      sampling: how they are drawn.
      stop_tokens: ids that end a row.
      key: row b draws by this key folded with b; or a key for each row, [B]. None is `jax.random.key(0)`.

    Raises:
      ValueError: for a prompt that is empty or has ids that are not in the vocabulary, for more tokens than the model's
        `max_seq_len`, or a model that cannot generate.
    """
    inputs = Inputs.of((model,), prompts, max_new_tokens, sampling, stop_tokens, key)
    complete = compiled(_complete, decoding.served(model), static_argnames="size", donate_argnums=1)
    tokens, logprobs, rows = complete(
        variables,
        _begin(decoding.programs(model), variables, inputs),
        inputs.settings,
        inputs.stop_tokens,
        max_new_tokens,
        size=bucket(max_new_tokens),
    )
    tokens, logprobs, lengths, stopped = jax.device_get(
        (tokens, logprobs, rows.count, rows.stopped)
    )
    return Generation(tokens[:, :max_new_tokens], logprobs[:, :max_new_tokens], lengths, stopped)


def stream(
    model: SequenceModel,
    variables: Any,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    *,
    sampling: Sampling = PLAIN,
    stop_tokens: Collection[int] = (),
    key: Key[Array, "..."] | None = None,
) -> Iterator[Step]:
    """The tokens of `generate`, which takes the same arguments, one step of all rows at a time.

    It ends when every row has stopped. Arguments are checked at once, and not when the first step is asked for.
    """
    inputs = Inputs.of((model,), prompts, max_new_tokens, sampling, stop_tokens, key)
    return _steps(decoding.programs(model), variables, inputs, max_new_tokens)


def _steps(
    programs: Programs, variables: Any, inputs: Inputs, max_new_tokens: int
) -> Iterator[Step]:
    rows, before = None, np.zeros(len(inputs.lengths), bool)
    for _ in range(max_new_tokens):
        if rows is None:
            rows = _begin(programs, variables, inputs)
        else:
            rows = programs.advance(variables, rows, inputs.settings, inputs.stop_tokens)
        token, logprob, stopped = jax.device_get((rows.token, rows.logprob, rows.stopped))
        yield Step(np.where(before, NO_TOKEN, token), np.where(before, 0, logprob), stopped)
        if stopped.all():
            return
        before = stopped


def _begin(programs: Programs, variables: Any, inputs: Inputs) -> Rows:
    """Rows with their first token."""
    return programs.begin(
        variables,
        inputs.prompts,
        inputs.lengths,
        inputs.keys,
        inputs.settings,
        inputs.stop_tokens,
        max_length=inputs.max_length,
    )


def _complete(
    model: SequenceModel,
    variables: Any,
    rows: Rows,
    settings: Settings,
    stop_tokens: Int[Array, " S"],
    max_new_tokens: Int[Array, ""],
    *,
    size: int,
):
    """Tokens and logprobs [B, size] of rows that have their first one, and the rows at the end."""
    shape = (len(rows.token), size)
    tokens = jnp.full(shape, NO_TOKEN, jnp.int32).at[:, 0].set(rows.token)
    logprobs = jnp.zeros(shape).at[:, 0].set(rows.logprob)

    def unfinished(carry):
        step, rows, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(rows.stopped)

    def body(carry):
        step, before, tokens, logprobs = carry
        rows = decoding.advance(model, variables, before, settings, stop_tokens)
        tokens = tokens.at[:, step].set(jnp.where(before.stopped, NO_TOKEN, rows.token))
        logprobs = logprobs.at[:, step].set(jnp.where(before.stopped, 0, rows.logprob))
        return step + 1, rows, tokens, logprobs

    _, rows, tokens, logprobs = jax.lax.while_loop(unfinished, body, (1, rows, tokens, logprobs))
    return tokens, logprobs, rows
