"""The state-space-duality scan in pure JAX: the chunked form of Dao and Gu (arXiv 2405.21060, section 6).

Inside a chunk the scan is a product with the lower triangular matrix of weights (C_t · B_s) exp(cs_t - cs_s) dt_s,
where cs is the cumulative sum of dt A; between chunks travels the state. Memory is linear in time: the forward keeps
the state before each chunk, the backward walks the chunks from the last to the first and differentiates one at a time,
with the gradient of the state as the carry.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.residuals import keep
from pallas_kernels.ssd_scan.state import skip, state_or_zeros

CHUNK = 64


def ssd_scan(x, dt, A, B, C, D, reset, state, *, chunk_size):
    """Returns `(y [B, T, H, P], state [B, H, P, N])`; see the package for the arguments."""
    batch, time, heads, dim = x.shape
    state = state_or_zeros(state, x, A, B)
    groups = (B.shape[2], heads // B.shape[2])
    chunk_size = min(chunk_size or CHUNK, time)
    dt = dt.astype(state.dtype)
    by_group = (
        x.reshape(batch, time, *groups, dim),
        dt.reshape(batch, time, *groups),
        (dt * A).reshape(batch, time, *groups),
    )
    past = state.reshape(batch, *groups, *state.shape[2:])
    y, last = _scan(chunk_size, *by_group, B, C, reset, past)
    return skip(y.reshape(x.shape), x, D).astype(x.dtype), last.reshape(state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk_size, x, dt, log_decay, B, C, reset, state):
    """`(y [B, T, G, K, P], state [B, G, K, P, N])`, with K heads a group, in the dtype of the state."""
    return _forward(chunk_size, x, dt, log_decay, B, C, reset, state)[0]


def _forward(chunk_size, *inputs):
    *inputs, state = inputs

    def chunk(past, block):
        y, state = _chunk(past, *block)
        return state, (y, past)

    state, (y, pasts) = jax.lax.scan(chunk, state, _to_chunks(inputs, chunk_size))
    y, pasts = keep(_from_chunks(y, inputs[0].shape[1]), pasts)
    return (y, state), (inputs, pasts)


def _backward(chunk_size, saved, cotangents):
    (*inputs, reset), pasts = saved
    d_y, d_state = cotangents

    def chunk(d_state, block):
        past, inputs, reset, d_y = block
        _, pull = jax.vjp(lambda past, *inputs: _chunk(past, *inputs, reset), past, *inputs)
        d_past, *d_inputs = pull((d_y, d_state))
        return d_past, d_inputs

    blocks = (pasts, *_to_chunks((inputs, reset, d_y), chunk_size))
    d_state, d_inputs = jax.lax.scan(chunk, d_state, blocks, reverse=True)
    return *(_from_chunks(x, d_y.shape[1]) for x in d_inputs), None, d_state


_scan.defvjp(_forward, _backward)


def _chunk(past, x, dt, log_decay, B, C, reset):
    """One chunk of Q tokens.

    Args:
        past: the state before it, [B, G, K, P, N].
        x: [B, Q, G, K, P].
        dt: [B, Q, G, K].
        log_decay: dt A, [B, Q, G, K].
        B: [B, Q, G, N].
        C: [B, Q, G, N].
        reset: bool [B, Q], which tokens start from an empty state; None: none.

    Returns:
        `(y [B, Q, G, K, P], state)`.
    """
    dt = jnp.moveaxis(dt, 1, -1)
    total = jnp.cumsum(jnp.moveaxis(log_decay, 1, -1), axis=-1)  # [B, G, K, Q]
    allowed = np.tri(x.shape[1], dtype=bool)
    if reset is None:
        reads = continues = is_last = True
    else:
        segment = jnp.cumsum(reset, axis=-1)[:, None, None]
        allowed = allowed & (segment[..., :, None] == segment[..., None, :])
        reads, is_last = segment == 0, segment == segment[..., -1:]
        continues = reads[..., -1:]
    # Only sums over tokens between s and t are exponentiated, which are never positive.
    decay = jnp.exp(jnp.where(allowed, total[..., :, None] - total[..., None, :], -jnp.inf))
    from_past = jnp.where(reads, jnp.exp(total), 0)
    to_end = jnp.where(is_last, jnp.exp(total[..., -1:] - total), 0) * dt
    kept = jnp.where(continues, jnp.exp(total[..., -1:]), 0)

    weights = _dot("btgn,bsgn->bgts", C, B)[:, :, None] * decay * dt[..., None, :]
    y = _dot("bgkts,bsgkp->bgktp", weights.astype(x.dtype), x)
    y += from_past[..., None] * _dot("btgn,bgkpn->bgktp", C.astype(past.dtype), past)
    written = (x * jnp.moveaxis(to_end, -1, 1)[..., None]).astype(x.dtype)
    state = kept[..., None] * past + _dot("bsgkp,bsgn->bgkpn", written, B)
    return jnp.moveaxis(y, 3, 1), state


def _dot(equation, x, y):
    return jnp.einsum(
        equation, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )


def _to_chunks(tree, chunk_size):
    """Arrays [B, T, ...] -> [chunks, B, Q, ...].

    Zeros fill up the last chunk: with dt = 0 and no reset a state stays as it is.
    """

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk_size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _from_chunks(x, time: int):
    """[chunks, B, Q, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]
