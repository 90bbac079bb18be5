"""Recurrences whose time axis is split over a mesh axis: the state passes from shard to shard.

A linear recurrence needs of what came before no more than a state, and its state after a shard is the shard's own plus
the decayed one before it. So every device runs its share from an empty state, the states are gathered, of constant size
whatever the length, and each device works out its beginning and runs again from there: twice the work, and no device
waits for another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.segments import resets
from pallas_kernels.varying import vary_alike

# `state before -> (out, state after)` over the tokens of one device.
Scan = Callable[[Any], tuple[Any, Any]]


def across_shards(
    scan: Scan, initial: Any, segment_ids: jax.Array | None, axis_name: str, decay: Any
) -> tuple[Any, Any]:
    """Runs a recurrence over the shards of a mesh axis in their order, inside of `jax.shard_map`.

    Args:
      scan: the recurrence over this device's tokens, linear in the state.
      initial: pytree of arrays [B, ...]: the state before the first shard, the same on all devices.
      segment_ids: int [B, T], as in the ops: a state is of one segment, and is lost with the beginning of the next.
        None: all tokens are of one segment.
      axis_name: the mesh axis.
      decay: pytree as `initial`, of arrays that broadcast against it: by how much this shard's tokens multiply a state.

    Returns:
      out of this shard, and the state after the last one, the same on all devices.
    """
    if segment_ids is None:
        segment_ids = jnp.ones((jax.tree.leaves(initial)[0].shape[0], 1), jnp.int32)
    _, own = scan(jax.tree.map(jnp.zeros_like, initial))
    reset, is_token = resets(segment_ids)
    shard = {
        "state": own,
        "decay": decay,
        "is_empty": ~jnp.any(is_token, axis=1),
        "is_one_segment": ~jnp.any(reset, axis=1),
        "first": _id_at(segment_ids, jnp.argmax(is_token, axis=1)),
        "last": _id_at(
            segment_ids, segment_ids.shape[1] - 1 - jnp.argmax(is_token[:, ::-1], axis=1)
        ),
    }
    shards = jax.lax.all_gather(vary_alike(shard), axis_name)
    shards, initial = vary_alike((shards, initial))
    # The segment of the initial state is the first that comes, whichever it is.
    beginning = (initial, shards["first"][0], ~shards["is_empty"][0] & False)
    after, befores = jax.lax.scan(_pass, beginning, shards)
    index = jax.lax.axis_index(axis_name)
    out, _ = scan(jax.tree.map(lambda x: x[index], befores))
    return out, jax.tree.map(
        lambda x: jax.lax.psum(jnp.where(index == 0, x, 0), axis_name), after[0]
    )


def _pass(carry, shard):
    """From the state before a shard, its segment and whether any token has come, to those after it."""
    state, segment, has_begun = carry
    goes_on = ~has_begun | shard["is_empty"] | (shard["first"] == segment)
    before = jax.tree.map(lambda x: _where(goes_on, x, 0), state)
    after = jax.tree.map(
        lambda own, decay, x: own + _where(shard["is_one_segment"], decay * x, 0),
        shard["state"], shard["decay"], before,
    )  # fmt: skip
    segment = jnp.where(shard["is_empty"], segment, shard["last"])
    return (after, segment, has_begun | ~shard["is_empty"]), before


def _id_at(segment_ids, index):
    return jnp.take_along_axis(segment_ids, index[:, None], axis=1)[:, 0]


def _where(rows, x, other):
    """Rows [B, ...] of x where `rows` [B] holds, `other` elsewhere."""
    return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, other)
