"""Segments of a row, as a recurrence meets them: where its state is emptied, and which tokens it passes by."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.state import runs


def resets(segment_ids) -> tuple[jax.Array, jax.Array]:
    """Which tokens start from an empty state, and which are no padding: bool [B, T] each, of int [B, T].

    A segment is a run of one id; padding, id 0, does not end it. The first segment of a row goes on from the
    initial state, so that its beginning is no reset.
    """
    numbers = runs(segment_ids)
    reached = jnp.maximum(jax.lax.cummax(numbers, axis=1), 1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return reached > before, numbers > 0
