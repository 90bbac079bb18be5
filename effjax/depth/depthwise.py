"""Recursions applied to tokens that are each at a depth of their own: what continuous depth-wise batching is made of.

A step of ordinary decoding takes all rows of a batch through all recursions, so that one is computed if any row takes
it. As the recursions are one function, a batch need not walk in step: each row can be at its own recursion, and a token
then costs as many applications as it takes (Bae et al., 2024, arXiv 2410.20672, on "continuous depth-wise batching";
Bae et al., 2025, arXiv 2507.10524, on inference throughput). Here is one such application, and how a token enters
before the first and leaves after its last; in which order is up to a loop (`effjax.serving.generate_depthwise`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.depth import state_pool
from effjax.depth.sharing import Layout, RecursiveState, run
from effjax.depth.stack import Stack


@flax.struct.dataclass
class Journey:
    """One token of each row, and how far it has come.

    Attributes:
      x: [B, 1, D] its hidden state.
      recursion: [B, 1] recursions behind it, which is the index of the next.
      goes_on: [B, 1] whether it takes the next; if not, it is ready to leave, or there is none.
      kept: what the routing remembers of it: a pytree of arrays [B, 1, ...].
    """

    x: Float[Array, "B 1 D"]
    recursion: Int[Array, "B 1"]
    goes_on: Bool[Array, "B 1"]
    kept: Any


class Depthwise(nn.Module):
    """A depth policy whose tokens may be at different recursions at the same time.

    A subclass says by `layout` what the recursions are, by `num_states` how many of them keep a decode state, and by
    `itinerary` who takes them: an object with

      begin(x, *, num_recursions) -> (goes_on, kept)                    before the first recursion
      after(r, x, y, kept, *, num_recursions) -> (x, goes_on, kept)     after recursion r, where f(x) = y

    with x and y [B, 1, D], r and goes_on [B, 1], and `kept` as in a `Journey`.

    Recursions with the same blocks are one application for all rows. In a sequence they have different ones, and each
    is applied by itself, to a batch of which it concerns some rows: right, but nothing is saved.
    """

    def layout(self, stack: Stack) -> Layout:
        """How the layers become recursions."""
        raise NotImplementedError

    def repeated(self, stack: Stack) -> tuple[Stack, ...]:
        """The stacks that the stages of a pipeline hold the repeats of: those of the recursions."""
        return tuple(stack.take(layers) for layers in self.layout(stack).shared)

    def num_states(self) -> int:
        """How many of the recursions, from the first on, keep a decode state; later ones read that of the first."""
        raise NotImplementedError

    def itinerary(self) -> Any:
        """Who takes which recursion."""
        raise NotImplementedError

    def init_pool(
        self, stack: Stack, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> RecursiveState:
        """Empty decode states for a batch whose rows are at depths of their own.

        Those of recursions with the same blocks are one pool: row b of the i-th of them is its row i * batch_size + b.
        """
        layout = self.layout(stack)

        def empty(layers, num_rows):
            states = stack.take(layers).init_state(num_rows, max_length, d_model, dtype)
            return state_pool.pool_of(states)

        around = [(empty(layers, batch_size),) if layers else () for layers in layout.ends]
        pools = tuple(
            tuple(empty(layout.shared[i], batch_size * self._num_kept(alike)) for i in step)
            for step, alike in layout.alike.items()
        )
        return RecursiveState(around[0], pools, around[1])

    def pool_of(self, stack: Stack, states: RecursiveState) -> RecursiveState:
        """Decode states as `init_state` makes them, laid out as `init_pool` does for a batch of their rows."""
        axis = int(stack.scan_layers)
        join = lambda *parts: jnp.concatenate(parts, axis)  # noqa: E731
        pooled = state_pool.pool_of(states)
        pools = tuple(
            jax.tree.map(join, *(pooled.recursions[r] for r in alike[: self._num_kept(alike)]))
            for alike in self.layout(stack).alike.values()
        )
        return dataclasses.replace(pooled, recursions=pools)

    def put(
        self, stack: Stack, pool: RecursiveState, new: RecursiveState, rows: Int[Array, " K"]
    ) -> RecursiveState:
        """The pool of a batch with those of K rows, `new`, in some of its rows."""
        axis = int(stack.scan_layers)

        def put(old, values, places=1):
            batch_size = jax.tree.leaves(old)[0].shape[axis] // places if old else 0
            begin = jnp.arange(places, dtype=jnp.int32)[:, None] * batch_size
            return state_pool.put(old, values, (begin + rows).reshape(-1), axis=axis)

        pools = tuple(
            put(old, values, self._num_kept(alike))
            for old, values, alike in zip(
                pool.recursions, new.recursions, self.layout(stack).alike.values(), strict=True
            )
        )
        return RecursiveState(put(pool.first, new.first), pools, put(pool.last, new.last))

    @nn.compact
    def enter(
        self,
        stack: Stack,
        x: Float[Array, "K 1 D"],
        *,
        rows: Int[Array, " K"],
        positions: Int[Array, "K 1"],
        segment_ids: Int[Array, "K 1"],
        pool: RecursiveState,
    ) -> tuple[Journey, RecursiveState]:
        """Takes a token of some rows through what is before the recursions.

        Args:
          stack: all the layers.
          x: its hidden state.
          rows: which rows of the batch these are; past the end of the batch: none.
          positions: of the token in its row.
          segment_ids: 0 marks a row that has no token.
          pool: decode states, from `init_pool`.

        Returns:
          (the beginning of its journey, the pool).
        """
        first, _, _ = self.layout(stack).bind(stack, self)
        x, states = _run_rows(first, x, rows, positions, segment_ids, pool.first)
        goes_on, kept = self.itinerary().begin(x, num_recursions=self.num_recursions)
        journey = Journey(
            x=x,
            recursion=jnp.zeros_like(rows)[:, None],
            goes_on=goes_on & (segment_ids > 0),
            kept=kept,
        )
        return journey, dataclasses.replace(pool, first=states)

    @nn.compact
    def recurse(
        self,
        stack: Stack,
        journey: Journey,
        *,
        positions: Int[Array, "B 1"],
        pool: RecursiveState,
    ) -> tuple[Journey, RecursiveState]:
        """Applies to the token of each row that goes on the recursion that is its next.

        Args:
          stack: all the layers.
          journey: of all rows of the batch.
          positions: of each token in its row.
          pool: decode states, from `init_pool`.

        Returns:
          (the journeys one recursion further, the pool).
        """
        layout = self.layout(stack)
        _, recursions, _ = layout.bind(stack, self)
        batch_size = len(journey.x)
        y, pools = journey.x, []
        for alike, states in zip(layout.alike.values(), pool.recursions, strict=True):
            place = jnp.clip(journey.recursion - alike[0], 0, len(alike) - 1)
            here = journey.goes_on & (journey.recursion == place + alike[0])
            keeps = place < self._num_kept(alike)
            rows = jnp.where(keeps, place, 0)[:, 0] * batch_size + jnp.arange(batch_size)
            out, states = _run_rows(
                recursions[alike[0]],
                journey.x,
                rows,
                positions,
                here.astype(jnp.int32),
                states,
                writes=(here & keeps)[:, 0],
                used=None if len(layout.alike) == 1 else jnp.any(here).astype(jnp.int32),
            )
            y = jnp.where(here[..., None], out, y)
            pools.append(states)
        after = self.itinerary().after(
            journey.recursion, journey.x, y, journey.kept, num_recursions=self.num_recursions
        )
        moved = Journey(after[0], journey.recursion + 1, *after[1:])
        journey = jax.tree.map(
            lambda new, old: jnp.where(_like(journey.goes_on, old), new, old), moved, journey
        )
        return journey, dataclasses.replace(pool, recursions=tuple(pools))

    @nn.compact
    def leave(
        self,
        stack: Stack,
        x: Float[Array, "K 1 D"],
        *,
        rows: Int[Array, " K"],
        positions: Int[Array, "K 1"],
        segment_ids: Int[Array, "K 1"],
        pool: RecursiveState,
    ) -> tuple[Float[Array, "K 1 D"], RecursiveState]:
        """Takes a token of some rows through what is after the recursions. Arguments as for `enter`."""
        _, _, last = self.layout(stack).bind(stack, self)
        x, states = _run_rows(last, x, rows, positions, segment_ids, pool.last)
        return x, dataclasses.replace(pool, last=states)

    def _num_kept(self, alike: tuple[int, ...]) -> int:
        """How many of some recursions keep a decode state."""
        return sum(r < self.num_states() for r in alike)


def _run_rows(stacks, x, rows, positions, segment_ids, pool, *, writes=None, used=None):
    """Applies stacks to one token of some rows. Returns (x, the states of all rows)."""
    if not stacks:
        return x, pool
    axis = int(stacks[0].scan_layers)
    writes = segment_ids[:, 0] > 0 if writes is None else writes
    lent = state_pool.lend(pool, rows, writes, axis=axis)
    x, new_states, _ = run(
        stacks, x, positions=positions, segment_ids=segment_ids, states=lent, used=used
    )
    return x, state_pool.give_back(pool, new_states, rows, writes, axis=axis)


def _like(condition: Bool[Array, "B 1"], values: Array) -> Array:
    """The condition with as many axes as the values."""
    return condition.reshape(condition.shape + (1,) * (values.ndim - condition.ndim))
