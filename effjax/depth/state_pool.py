"""Decode states of many rows, of which a batch uses some at a time: lent to it, and given back."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from effjax.mixers import KVState
from effjax.mixers.kv_pool import KVPool, KVRows


def pool_of(states: Any) -> Any:
    """Decode states as a pool that rows are lent from: caches of attention stay where they are when they are lent."""
    return jax.tree.map(
        lambda s: KVPool.of(s) if isinstance(s, KVState) else s, states, is_leaf=_is_cache
    )


def lend(pool: Any, rows: Int[Array, " B"], writes: Bool[Array, " B"], *, axis: int) -> Any:
    """The states of some rows of a pool, for a batch that decodes one token a row.

    Args:
      pool: from `pool_of`.
      rows: row of the pool of each row of the batch; past the end: none.
      writes: rows of the batch whose token changes the pool, no two of them of one row.
      axis: of the rows in the arrays of the pool: 1 behind an axis of scanned layers, else 0.
    """

    def take(part):
        if not isinstance(part, KVPool):
            return jnp.take(part, rows, axis=axis, mode="clip")
        repeats = part.length.shape[:axis]
        return KVRows(
            part,
            jnp.broadcast_to(rows, (*repeats, *rows.shape)),
            jnp.broadcast_to(writes, (*repeats, *writes.shape)),
        )

    return jax.tree.map(take, pool, is_leaf=_is_pool)


def give_back(
    pool: Any, lent: Any, rows: Int[Array, " B"], writes: Bool[Array, " B"], *, axis: int
) -> Any:
    """The pool with the states of those rows as they are now. Arguments as for `lend`."""

    def put(part, now):
        if isinstance(part, KVPool):
            return now.pool  # was written where it lies
        written = jnp.where(writes, rows, part.shape[axis])
        return part.at[(slice(None),) * axis + (written,)].set(now, mode="drop")

    return jax.tree.map(put, pool, lent, is_leaf=_is_pool)


def put(pool: Any, new: Any, rows: Int[Array, " K"], *, axis: int) -> Any:
    """The pool with the K rows of another one in some of its rows. `axis` is as for `lend`."""
    where = (slice(None),) * axis + (rows,)
    return jax.tree.map(lambda old, values: old.at[where].set(values), pool, new)


def _is_cache(part: Any) -> bool:
    return isinstance(part, KVState)


def _is_pool(part: Any) -> bool:
    return isinstance(part, KVPool)
