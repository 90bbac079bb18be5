"""One token of the selective scan, and what many leave of a state."""

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike


def step(state, u, delta, A, B, C, D, z):
    """h = exp(Δ A) h + Δ B u and y = (C h + D u) silu(z), of a state [B, E, N], channels [B, E] and B, C [B, N].

    Returns `(y [B, E], state)` in the dtype of the state.
    """
    u, delta, B, C = (x.astype(state.dtype) for x in (u, delta, B, C))
    state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
    y = jnp.sum(state * C[:, None], axis=-1)
    return skip_and_gate(y, u, D, z), state


def state_or_zeros(state, u, A):
    """The state before the first token: that given, or zeros [B, E, N] in A's dtype for None."""
    if state is not None:
        return state
    return vary_alike((jnp.zeros((u.shape[0], *A.shape), A.dtype), u))[0]


def skip_and_gate(y, u, D, z):
    """(y + D u) silu(z) in the dtype of y; without D or z that part is left out."""
    if D is not None:
        y = y + D.astype(y.dtype) * u.astype(y.dtype)
    return y if z is None else y * jax.nn.silu(z.astype(y.dtype))


def decay_over(delta, A):
    """By how much tokens multiply the state before them: delta [B, T, E], A [E, N] -> [B, E, N]."""
    return jnp.exp(jnp.sum(delta.astype(A.dtype), axis=1)[..., None] * A)
