"""One token of the state-space-duality scan."""

import jax.numpy as jnp

from pallas_kernels.varying import vary_alike


def step(state, x, dt, A, B, C, D):
    """h = exp(dt A) h + dt x Bᵀ and y = h C + D x, of a state [B, H, P, N], x [B, H, P], dt [B, H], B, C [B, G, N].

    Returns `(y [B, H, P], state)` in the dtype of the state.
    """
    per_group = x.shape[1] // B.shape[1]
    x, dt, B, C = (array.astype(state.dtype) for array in (x, dt, B, C))
    B, C = (jnp.repeat(array, per_group, axis=1)[:, :, None] for array in (B, C))
    decay = jnp.exp(dt * A)[..., None, None]
    state = decay * state + (dt[..., None] * x)[..., None] * B
    y = jnp.sum(state * C, axis=-1)
    return skip(y, x, D), state


def state_or_zeros(state, x, A, B):
    """The state before the first token: that given, or zeros [B, H, P, N] in A's dtype for None."""
    if state is not None:
        return state
    zeros = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[3]), A.dtype)
    return vary_alike((zeros, x))[0]


def skip(y, x, D):
    """y + D x in the dtype of y; without D, y."""
    return y if D is None else y + D.astype(y.dtype)[:, None] * x.astype(y.dtype)
