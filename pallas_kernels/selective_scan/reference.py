"""The selective scan written out: one token after the other, in the dtype of the inputs (float64 too)."""

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.state import state_or_zeros, step


def selective_scan(u, delta, A, B, C, D, z, resets, state):
    """Returns `(y [B, T, E], state [B, E, N])`; see the package for the arguments."""

    state = state_or_zeros(state, u, A)

    def token(state, inputs):
        u, delta, B, C, z, reset = inputs
        if reset is not None:
            state = jnp.where(reset[:, None, None], 0, state)
        y, state = step(state, u, delta, A, B, C, D, z)
        return state, y

    in_time = jax.tree.map(lambda x: x.swapaxes(0, 1), (u, delta, B, C, z, resets))
    state, y = jax.lax.scan(token, state, in_time)
    return y.swapaxes(0, 1).astype(u.dtype), state
