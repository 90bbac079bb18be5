"""The state-space-duality scan written out: one token after the other, in the dtype of the inputs (float64 too)."""

import jax
import jax.numpy as jnp

from pallas_kernels.ssd_scan.state import state_or_zeros, step


def ssd_scan(x, dt, A, B, C, D, reset, state, *, chunk_size):
    """Returns `(y [B, T, H, P], state [B, H, P, N])`, which needs no chunks; see the package for the arguments."""
    del chunk_size
    state = state_or_zeros(state, x, A, B)

    def token(state, inputs):
        x, dt, B, C, reset = inputs
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        y, state = step(state, x, dt, A, B, C, D)
        return state, y

    in_time = jax.tree.map(lambda array: array.swapaxes(0, 1), (x, dt, B, C, reset))
    state, y = jax.lax.scan(token, state, in_time)
    return y.swapaxes(0, 1).astype(x.dtype), state
