"""Linear attention in pure JAX: the chunked form, memory linear in time.

Inside a chunk the weights φ(q) · φ(k) come from q · k directly and nothing is expanded; between chunks
travels the state, the sum of φ(k) vᵀ. The forward keeps the state before each chunk; the backward walks
the chunks from the last to the first and differentiates one at a time, with the gradient of the state as
the carry.

Values carry one more column, of ones, so that the sum of the weights comes out beside the weighted sum of
the values, and the sum of φ(k) beside the state. Weights lie as [keys, queries] and sums as [values,
queries]: every large operand of a matrix product is then contiguous, forward and backward, which XLA:CPU
needs to be fast.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.feature_maps import FeatureMap
from pallas_kernels.linear_attention.state import LinearAttentionState
from pallas_kernels.residuals import keep
from pallas_kernels.varying import vary_alike

# Up to this length the quadratic form alone takes fewer operations than building the state of the Taylor map.
SINGLE_CHUNK = 512
CHUNK = 128
# Queries of a chunk are taken in blocks, each with the keys up to its end: that skips the masked half.
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static arguments of the op. `is_recurrent`: a state comes in, or travels between chunks."""

    feature_map: FeatureMap
    chunk_size: int
    is_recurrent: bool
    normalize: bool
    eps: float


def linear_attention(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state
):
    """Returns `(out [B, T, H, Dv], LinearAttentionState)`, wanted or not; see the package for the arguments."""
    time = q.shape[1]
    if chunk_size is None:
        chunk_size = SINGLE_CHUNK if time <= SINGLE_CHUNK and state is None else CHUNK
    chunk_size = min(chunk_size, time)
    is_recurrent = state is not None or chunk_size < time
    spec = _Spec(feature_map, chunk_size, is_recurrent, normalize, eps)
    if state is None:
        features = feature_map.num_features(q.shape[-1])
        shape = (q.shape[0], q.shape[2], features, v.shape[-1] + 1)
        state = jnp.zeros_like(q, _accumulator(q.dtype), shape=shape)
    else:
        state = jnp.concatenate([state.kv, state.k_sum[..., None]], axis=-1)
    q, k, v, runs, state = vary_alike((q, k, v, runs, state))
    out, last_state = _linear_attention(spec, q, k, v, runs, state)
    if not is_recurrent:
        # Outside of the custom VJP, so that a state that nobody uses costs nothing, backward neither.
        k, values = k.swapaxes(1, 2), _with_ones(v).swapaxes(1, 2)
        last_state, _ = _advance(spec, state, _first_run(q), k, values, runs)
    return out, LinearAttentionState(last_state[..., :-1], last_state[..., -1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_attention(spec, q, k, v, runs, state):
    return _forward(spec, q, k, v, runs, state)[0]


def _forward(spec, q, k, v, runs, state):
    time, dim = v.shape[1], v.shape[-1]
    blocks = tuple(_to_chunks(spec, x) for x in (q, k, _with_ones(v)))
    if runs is not None:
        runs = jnp.moveaxis(_split(spec, runs), 1, 0)

    def chunk(carry, block):
        sums, after = _chunk(spec, *carry, *block)
        return after, (sums, carry)

    start = (state, _first_run(q))
    (state, _), (sums, (states, newest)) = jax.lax.scan(chunk, start, (*blocks, runs))
    out, total = sums[..., :dim, :], sums[..., dim:, :]
    if spec.normalize:
        total += spec.eps
        out /= total
    out = _from_chunks(out.swapaxes(-1, -2), time).astype(v.dtype)
    states, out, total = keep(states, out, total)
    return (out, state), (blocks, runs, (states, newest), out, total)


def _backward(spec, saved, cotangents):
    blocks, runs, pasts, out, total = saved
    d_out, d_state = cotangents
    d_out = d_out.astype(total.dtype)
    d_sums = _to_chunks(spec, d_out).swapaxes(-1, -2)
    if spec.normalize:
        # out = numerator / total
        d_total = -jnp.sum(d_out * out, axis=-1, keepdims=True)
        d_total = _to_chunks(spec, d_total).swapaxes(-1, -2)
        d_sums = jnp.concatenate([d_sums, d_total], axis=-2) / total
    else:
        d_sums = jnp.pad(d_sums, ((0, 0),) * 3 + ((0, 1), (0, 0)))

    def chunk(d_state, block):
        (past, run), (q, k, values), runs, d_sums = block

        def differentiable(past, q, k, values):
            sums, (state, _) = _chunk(spec, past, run, q, k, values, runs)
            return sums, state

        _, pull = jax.vjp(differentiable, past, q, k, values)
        d_past, *d_block = pull((d_sums, d_state))
        return d_past, tuple(d_block)

    d_state, d_blocks = jax.lax.scan(chunk, d_state, (pasts, blocks, runs, d_sums), reverse=True)
    dq, dk, d_values = (_from_chunks(x, out.shape[1]) for x in d_blocks)
    return dq, dk, d_values[..., :-1], None, d_state


_linear_attention.defvjp(_forward, _backward)


def _chunk(spec, past, run, q, k, values, runs):
    """One chunk.

    Args:
        past: the state before it, [B, H, F, E].
        run: int [B], the segment that `past` belongs to.
        q: [B, H, C, D].
        k: [B, H, C, D].
        values: [B, H, C, E].
        runs: int [B, C], the segments of its tokens; None: all of the segment of `past`.

    Returns:
        `(sums [B, H, E, C], (state, run))`.
    """
    sums = _within(spec, q, k, values, runs)
    if not spec.is_recurrent:
        return sums, (past, run)
    phi_q = _expand(spec, q, None if runs is None else runs == run[:, None])
    sums += _dot("bhfe,bhft->bhet", past, phi_q)
    return sums, _advance(spec, past, run, k, values, runs)


def _advance(spec, past, run, k, values, runs):
    """The state after a chunk, and the segment that it belongs to."""
    if runs is None:
        phi_k = _expand(spec, k, None)
    else:
        last = jnp.maximum(run, runs.max(axis=1))
        phi_k = _expand(spec, k, runs == last[:, None])
        past = jnp.where((run == last)[:, None, None, None], past, 0)
        run = last
    return past + _dot("bhfs,bhse->bhfe", phi_k, values.astype(phi_k.dtype)), run


def _within(spec, q, k, values, runs):
    """The sums [B, H, E, C] over the tokens of the chunk itself."""

    # Rematerialised, so that the backward holds the weights of one block at a time.
    @functools.partial(jax.checkpoint, static_argnums=(0,))
    def block(start, q, k, values, runs):
        stop = k.shape[2]
        weights = spec.feature_map.similarity(k, q)
        allowed = np.arange(stop)[:, None] <= np.arange(start, stop)
        if runs is not None:
            of_keys, of_queries = runs[:, None, :, None], runs[:, None, None, start:]
            allowed = allowed & (of_keys == of_queries) & (of_queries != 0)
        weights = jnp.where(allowed, weights, 0).astype(values.dtype)
        return _dot("bhse,bhst->bhet", values, weights)

    length = q.shape[2]
    sums = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = (k[:, :, :stop], values[:, :, :stop], None if runs is None else runs[:, :stop])
        sums.append(block(start, q[:, :, start:stop], *seen))
    return jnp.concatenate(sums, axis=-1)


def _expand(spec, x, keep):
    """φ(x) [B, H, F, C] of x [B, H, C, D], 0 where a token is not kept (bool [B, C])."""
    features = spec.feature_map.expand(x.swapaxes(-1, -2).astype(_accumulator(x.dtype)))
    return features if keep is None else jnp.where(keep[:, None, None], features, 0)


def _with_ones(v):
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def _first_run(q):
    return jnp.ones_like(q, jnp.int32, shape=q.shape[:1])


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=_accumulator(x.dtype))


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _split(spec, x):
    """[B, T, ...] -> [B, chunks, C, ...]. Zeros fill up the last chunk: with the value 0 they add nothing."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % spec.chunk_size)
    x = jnp.pad(x, padding)
    return x.reshape(x.shape[0], -1, spec.chunk_size, *x.shape[2:])


def _to_chunks(spec, x):
    """[B, T, H, D] -> [chunks, B, H, C, D]."""
    return _split(spec, x).transpose(1, 0, 3, 2, 4)


def _from_chunks(x, time: int):
    """[chunks, B, H, C, D] -> [B, T, H, D]."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]
