"""Segments of a row, as a recurrence meets them: where its state is emptied, and which tokens it passes by."""

import jax
import jax.numpy as jnp


def runs(segment_ids) -> jax.Array:
    """Numbers the segments of each row 1, 2, ... in the order in which they begin; padding stays 0.

    A recurrent state knows only the present segment, so a segment is a run of one id: padding inside does not end
    it, and an id that returns after another one begins a new segment. Int [B, T] -> int32 [B, T].
    """
    index = jnp.arange(segment_ids.shape[1])
    is_token = segment_ids != 0
    last_token = jax.lax.cummax(jnp.where(is_token, index, -1), axis=1)
    before = jnp.pad(last_token[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    id_before = jnp.where(
        before < 0, 0, jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    )
    begins = is_token & (segment_ids != id_before)
    return jnp.where(is_token, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)


def resets(segment_ids) -> tuple[jax.Array, jax.Array]:
    """Which tokens start from an empty state, and which are no padding: bool [B, T] each, of int [B, T].

    A segment is a run of one id; padding, id 0, does not end it. The first segment of a row goes on from the
    initial state, so that its beginning is no reset.
    """
    numbers = runs(segment_ids)
    reached = jnp.maximum(jax.lax.cummax(numbers, axis=1), 1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return reached > before, numbers > 0
