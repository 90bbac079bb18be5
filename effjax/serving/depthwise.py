"""A batch whose rows are at recursions of their own: the steps of continuous depth-wise batching.

The counterpart of `effjax.serving.decoding` for models that apply the same blocks several times. A step applies the
shared blocks once to every row, whichever recursion each is at. A token that has taken its last one goes through the
layers after the recursions and the head; the next token of its row is drawn, and goes through the layers before them.
So no row waits for another, and a token takes as many steps as recursions (Bae et al., 2024, arXiv 2410.20672, on
"continuous depth-wise batching"; Bae et al., 2025, arXiv 2507.10524, on inference throughput).

Pure functions on an explicit state. The tokens of a text are those of `effjax.serving.generate`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from effjax.depth import Journey
from effjax.models import SequenceModel
from effjax.serving import decoding
from effjax.serving.decoding import Rows
from effjax.serving.programs import compiled
from effjax.serving.sampling import Settings

# What is around the recursions is computed for the rows that are there, padded to one of so many shares of a batch.
NUM_SHARES = 4


@flax.struct.dataclass
class Travelling:
    """Texts in the making, the newest token of each on its way through the recursions.

    Attributes:
      rows: the texts, their state one of `SequenceModel.init_pool`. A row that has stopped is free for another text.
      journey: of the newest token of each row.
      limit: [B] most tokens that the row gets.
      tokens: [B, N] what was drawn in the row; behind it anything.
      logprobs: [B, N] the log-probability of each token.
    """

    rows: Rows
    journey: Journey
    limit: Int[Array, " B"]
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]

    @property
    def leaves(self) -> Bool[Array, " B"]:
        """Rows whose newest token has no recursion before it any more."""
        return ~self.rows.stopped & ~self.journey.goes_on[:, 0]


def empty(
    model: SequenceModel,
    variables: Any,
    num_rows: int,
    *,
    max_length: int,
    max_new_tokens: int,
    with_penalty: bool,
) -> Travelling:
    """Rows without a text.

    Args:
      model: a model with recursions.
      variables: its variables.
      num_rows: B.
      max_length: tokens that a row has room for, prompt included.
      max_new_tokens: N.
      with_penalty: whether the rows remember their tokens, for a repetition penalty.

    Raises:
      ValueError: as `SequenceModel.init_pool`.
    """
    state = model.init_pool(num_rows, max_length)
    none = functools.partial(jnp.zeros, (num_rows,))
    rows = Rows(
        state=state,
        token=none(jnp.int32),
        logprob=none(),
        count=none(jnp.int32),
        stopped=jnp.ones((num_rows,), bool),
        keys=jax.random.split(jax.random.key(0), num_rows),
        seen=jnp.zeros((num_rows, model.vocab_size), bool) if with_penalty else None,
    )
    enter = functools.partial(_enter, model, token=rows.token, rows=jnp.arange(num_rows))
    journey, _ = jax.eval_shape(enter, variables, is_token=rows.stopped, state=state)
    return Travelling(
        rows=rows,
        journey=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), journey),
        limit=none(jnp.int32),
        tokens=jnp.zeros((num_rows, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((num_rows, max_new_tokens)),
    )


def admit(
    model: SequenceModel,
    variables: Any,
    batch: Travelling,
    rows: Int[Array, " K"],
    prompts: Int[Array, "K T"],
    lengths: Int[Array, " K"],
    keys: Key[Array, " K"],
    limits: Int[Array, " K"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
) -> Travelling:
    """Reads prompts into free rows, draws the first token of each, and takes that to the recursions.

    Args:
      model: the model of the batch.
      variables: its variables.
      batch: from `empty`, or from a step.
      rows: K rows that are free.
      prompts: token ids, padding behind them.
      lengths: tokens of each prompt.
      keys: one a text; its n-th token is drawn by the key folded with n.
      limits: most tokens that each text gets.
      settings: see `Sampling.settings`.
      stop_tokens: ids that end a text.
    """
    state = batch.rows.state
    new = decoding.begin(
        model,
        variables,
        prompts,
        lengths,
        keys,
        settings,
        stop_tokens,
        max_length=state.max_length,
    )
    new = dataclasses.replace(new, stopped=new.stopped | (new.count >= limits))

    # It enters by the states of the new rows alone: the caches of the batch are written once, where they are.
    layers = model.depth.pool_of(model.stack(), new.state.layers)
    journey, new_state = _enter(
        model,
        variables,
        token=new.token,
        rows=jnp.arange(len(lengths), dtype=jnp.int32),
        is_token=~new.stopped,
        state=dataclasses.replace(new.state, layers=layers),
    )
    write = lambda old, values: old.at[rows].set(values)  # noqa: E731
    state = dataclasses.replace(
        state,
        layers=model.depth.put(model.stack(), state.layers, new_state.layers, rows),
        length=write(state.length, new_state.length),
    )
    return Travelling(
        rows=decoding.map_rows(write, state, batch.rows, new),
        journey=jax.tree.map(write, batch.journey, journey),
        limit=batch.limit.at[rows].set(limits),
        tokens=batch.tokens.at[rows, 0].set(new.token),
        logprobs=batch.logprobs.at[rows, 0].set(new.logprob),
    )


def run(
    model: SequenceModel,
    variables: Any,
    batch: Travelling,
    is_wanted: Bool[Array, " B"],
    settings: Settings,
    stop_tokens: Int[Array, " S"],
    num_free: Int[Array, ""],
    most_steps: Int[Array, ""],
) -> tuple[Travelling, Int[Array, ""], Int[Array, ""]]:
    """Takes the tokens on until so many rows are free, or for so many steps.

    Args:
      model, variables, settings, stop_tokens: as for `admit`; a setting is one number for all rows or one a row.
      batch: the texts.
      is_wanted: rows whose text is to go on; the others are free from now on.
      num_free: rows that have stopped, at the end.
      most_steps: applications of the shared blocks.

    Returns:
      (the batch; steps; recursions that tokens took in them).
    """
    goes_on = batch.journey.goes_on & is_wanted[:, None]
    journey = dataclasses.replace(batch.journey, goes_on=goes_on)
    rows = dataclasses.replace(batch.rows, stopped=batch.rows.stopped | ~is_wanted)

    def unfinished(carry):
        batch, steps, _ = carry
        return (jnp.sum(batch.rows.stopped) < num_free) & (steps < most_steps)

    def body(carry):
        batch, steps, applications = carry
        applications += jnp.sum(batch.journey.goes_on, dtype=jnp.int32)
        return step(model, variables, batch, settings, stop_tokens), steps + 1, applications

    batch = dataclasses.replace(batch, rows=rows, journey=journey)
    return jax.lax.while_loop(unfinished, body, (batch, jnp.int32(0), jnp.int32(0)))


def step(
    model: SequenceModel,
    variables: Any,
    batch: Travelling,
    settings: Settings,
    stop_tokens: Int[Array, " S"],
) -> Travelling:
    """Every token takes its next recursion; where that was the last, the row's next token sets out.

    Args as for `run`.
    """
    journey, state = model.apply(variables, batch.journey, state=batch.rows.state, method="recurse")
    rows = dataclasses.replace(batch.rows, state=state)
    batch = dataclasses.replace(batch, rows=rows, journey=journey)
    sizes = _sizes(len(batch.limit))
    turn = functools.partial(_turn, model, variables, settings, stop_tokens)
    turns = [functools.partial(turn, size) for size in sizes]
    which = jnp.searchsorted(jnp.array([0, *sizes]), jnp.sum(batch.leaves))
    return jax.lax.switch(which, (lambda batch: batch, *turns), batch)


class Programs(NamedTuple):
    """The functions of this file, compiled for a model."""

    empty: Callable[..., Travelling]
    admit: Callable[..., Travelling]
    run: Callable[..., tuple[Travelling, Array, Array]]


def programs(model: SequenceModel) -> Programs:
    """`empty`, `admit` and `run` of the model as it is served; the two that are given a batch write in its place."""
    model = decoding.served(model)
    sizes = ("num_rows", "max_length", "max_new_tokens", "with_penalty")
    return Programs(
        # Compiled, so that no two arrays are one buffer: each is given away to be written in place.
        empty=compiled(empty, model, static_argnames=sizes),
        admit=compiled(admit, model, donate_argnums=1),
        run=compiled(run, model, donate_argnums=1),
    )


def _turn(model, variables, settings, stop_tokens, size: int, batch: Travelling) -> Travelling:
    """Up to `size` tokens leave the recursions, and the next ones of their rows enter."""
    leaves, num_rows = batch.leaves, len(batch.limit)
    rows = jnp.nonzero(leaves, size=size, fill_value=num_rows)[0].astype(jnp.int32)
    is_token = rows < num_rows
    source, place = jnp.minimum(rows, num_rows - 1), jnp.maximum(jnp.cumsum(leaves) - 1, 0)
    take = lambda a: a[source]  # noqa: E731

    output = model.apply(
        variables,
        take(batch.journey.x),
        rows=rows,
        segment_ids=is_token[:, None].astype(jnp.int32),
        state=batch.rows.state,
        method="leave",
    )
    texts = decoding.map_rows(take, output.state, batch.rows)
    texts = dataclasses.replace(texts, stopped=~is_token)
    own = {name: value[source] if jnp.ndim(value) else value for name, value in settings.items()}
    texts = decoding.grow(texts, output, own, stop_tokens)
    is_full = texts.count >= batch.limit[source]
    texts = dataclasses.replace(texts, stopped=texts.stopped | is_full)
    journey, state = _enter(
        model, variables, token=texts.token, rows=rows, is_token=~texts.stopped, state=texts.state
    )

    def spread(old, new):
        return jnp.where(leaves.reshape(-1, *[1] * (old.ndim - 1)), new[place], old)

    newest = (rows, texts.count - 1)
    return dataclasses.replace(
        batch,
        rows=decoding.map_rows(spread, state, batch.rows, texts),
        journey=jax.tree.map(spread, batch.journey, journey),
        tokens=batch.tokens.at[newest].set(texts.token, mode="drop"),
        logprobs=batch.logprobs.at[newest].set(texts.logprob, mode="drop"),
    )


def _enter(model, variables, *, token, rows, is_token, state):
    segment_ids = is_token[:, None].astype(jnp.int32)
    return model.apply(
        variables, token[:, None], rows=rows, segment_ids=segment_ids, state=state, method="enter"
    )


def _sizes(num_rows: int) -> list[int]:
    """Numbers of rows that the ends are computed for: the quarters of a batch, up to all of it."""
    return sorted({-(-num_rows * i // NUM_SHARES) for i in range(1, NUM_SHARES + 1)})
