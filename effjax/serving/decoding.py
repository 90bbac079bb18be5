"""Texts in the making, one a row of a batch: how they begin with a prompt and grow by a token at a time.

Pure functions on an explicit state, for any loop: `effjax.serving.generate` runs them until every row has stopped, and
a server may exchange rows in between.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from effjax.models import DecodeState, SequenceModel
from effjax.serving.programs import compiled
from effjax.serving.sampling import Settings, draw


@flax.struct.dataclass
class Rows:
    """Texts in the making.

    Attributes:
      state: the model's; it has seen every token but the newest.
      token: [B] the newest token.
      logprob: [B] its log-probability (natural) under the model, before temperature and filters.
      count: [B] tokens drawn so far.
      stopped: [B] whether the row takes no further token.
      keys: [B] random keys; a row's n-th token is drawn by its key folded with n.
      seen: [B, V] which tokens the row has, prompt included; None if no penalty asks for it.
    """

    state: DecodeState
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    count: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


def served(model: SequenceModel) -> SequenceModel:
    """The model as it is served: a mixture of experts drops no token.

    What a buffer of fixed capacity drops depends on how long the padded batch is, so that one prompt would change the
    text of another. The parameters are the same; the logits differ from those of the parallel pass at evaluation where
    that one drops tokens (`moe/fraction_dropped`).
    """
    ffn = model.ffn
    if ffn is None or not hasattr(ffn, "dispatch"):
        return model
    return model.clone(ffn=ffn.clone(dispatch="dropless"))


def begin(
    model: SequenceModel,
    variables: Any,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
    *,
    max_length: int,
) -> Rows:
    """Reads the prompts and draws the first token of each row.

    Args:
      model: a model whose mixers are causal and whose head scores the vocabulary.
      variables: its variables.
      prompts: token ids, padding behind them.
      lengths: tokens of each prompt, at least 1.
      keys: one a row.
      settings: see `Sampling.settings`.
      stop_tokens: a row that draws one of them has stopped.
      max_length: room of the decode state.

    Raises:
      ValueError: if the model's head gives no logits.
    """
    num_rows, width = prompts.shape
    is_text = jnp.arange(width) < lengths[:, None]
    output = model.apply(
        variables,
        prompts,
        segment_ids=is_text.astype(jnp.int32),
        state=model.init_state(num_rows, max_length),
        head_at=lengths[:, None] - 1,
    )
    if output.logits is None:
        raise ValueError(
            f"the model has the head {type(model.head).__name__}, which gives no logits; "
            "valid: one that scores the vocabulary (tied, untied)"
        )
    seen = None
    if "repetition_penalty" in settings:
        nothing = jnp.zeros((num_rows, model.vocab_size), bool)
        seen = _mark(nothing, jnp.where(is_text, prompts, model.vocab_size))
    rows = Rows(
        state=output.state,
        token=jnp.zeros((num_rows,), jnp.int32),
        logprob=jnp.zeros((num_rows,)),
        count=jnp.zeros((num_rows,), jnp.int32),
        stopped=jnp.zeros((num_rows,), bool),
        keys=keys,
        seen=seen,
    )
    return grow(rows, output, settings, stop_tokens)


def advance(
    model: SequenceModel,
    variables: Any,
    rows: Rows,
    settings: Settings,
    stop_tokens: Int[Array, " S"],
) -> Rows:
    """Reads the newest token of each row that has not stopped, and draws the next.

    To a row that has stopped nothing happens; no depth policy computes anything for its sake.

    Args and results as for `begin`.
    """
    output = model.apply(
        variables,
        rows.token[:, None],
        segment_ids=(~rows.stopped[:, None]).astype(jnp.int32),
        state=rows.state,
    )
    return grow(rows, output, settings, stop_tokens)


def grow(rows: Rows, output: Any, settings: Settings, stop_tokens: Int[Array, " S"]) -> Rows:
    """The rows with the model's new state and a token drawn from the logits of the one position that the head has read.

    Args:
      rows: B texts; nothing happens to those that have stopped.
      output: the model's for them, with logits [B, 1, V].
      settings: see `Sampling.settings`.
      stop_tokens: a row that draws one of them has stopped.
    """
    logits = output.logits[:, 0]
    token = draw(jax.vmap(jax.random.fold_in)(rows.keys, rows.count), logits, settings, rows.seen)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    stays = rows.stopped
    return dataclasses.replace(
        rows,
        state=output.state,
        token=jnp.where(stays, rows.token, token),
        logprob=jnp.where(stays, rows.logprob, logprob),
        count=rows.count + ~stays,
        stopped=stays | jnp.any(token[:, None] == stop_tokens, axis=1),
        seen=None if rows.seen is None else _mark(rows.seen, token[:, None]),
    )


def map_rows(function: Callable[..., Array], state: DecodeState, *rows: Rows) -> Rows:
    """Rows with that state, and with the function of every array that the given ones have beside theirs."""
    is_state = lambda part: isinstance(part, DecodeState)  # noqa: E731

    def mapped(part, *others):
        return state if is_state(part) else function(part, *others)

    return jax.tree.map(mapped, *rows, is_leaf=is_state)


class Programs(NamedTuple):
    """`begin` and `advance`, compiled for a model."""

    begin: Callable[..., Rows]
    advance: Callable[..., Rows]


def programs(model: SequenceModel) -> Programs:
    """Those of the model as it is served; the rows that `advance` is given it writes in their place."""
    model = served(model)
    return Programs(
        compiled(begin, model, static_argnames="max_length"),
        compiled(advance, model, donate_argnums=1),
    )


def _mark(seen: Bool[Array, "B V"], tokens: Int[Array, "B T"]) -> Bool[Array, "B V"]:
    """Marks tokens as seen; an id past the vocabulary marks nothing."""
    rows = jnp.arange(seen.shape[0])[:, None]
    return seen.at[rows, tokens].set(True, mode="drop")
