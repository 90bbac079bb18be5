"""Linear attention for NVIDIA Hopper (Pallas, Mosaic GPU): layouts, and the custom VJP around the kernels.

Two kernels forward: `gpu_states` walks time and leaves the state before each group of tokens, `gpu_outputs` takes all
blocks of tokens at once. Three backward: `gpu_states` walks back with the gradient of the state, and `gpu_gradients`
takes all blocks at once again. A group is short enough that its weights cost about as much as its meeting with the
state, and long enough that the states, in bfloat16, are a small part of what is read and written.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import hopper
from pallas_kernels.blocks import round_up
from pallas_kernels.linear_attention import gpu_features, gpu_gradients
from pallas_kernels.linear_attention.gpu_gradients import key_value_gradients, query_gradient
from pallas_kernels.linear_attention.gpu_outputs import outputs
from pallas_kernels.linear_attention.gpu_states import State, Tokens, states
from pallas_kernels.linear_attention.gpu_tile import BLOCK, VALUE_MULTIPLE, Spec, token_rows
from pallas_kernels.linear_attention.state import LinearAttentionState
from pallas_kernels.residuals import keep
from pallas_kernels.varying import vary_alike

LARGEST_VALUE_DIM = 128
# Tokens between two states.
GROUP = 256


def refuses(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state
) -> str | None:
    """What the kernels cannot do with these arguments or on this GPU, or None."""
    if q.dtype != jnp.bfloat16:
        return f"dtype {q.dtype}; it takes bfloat16"
    if v.shape[3] > LARGEST_VALUE_DIM:
        return f"values of {v.shape[3]}; it takes up to {LARGEST_VALUE_DIM}"
    return gpu_features.refuses(feature_map, q.shape[3]) or hopper.refuses_device()


def linear_attention(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state, interpret=False
):
    """Returns `(out [B, T, H, Dv], LinearAttentionState)`, wanted or not; see the package for the arguments.

    `chunk_size` is rounded up to whole blocks of 128 tokens. The features of the Taylor map stay in the kernels; those
    of any other map, of which there are at most 128, XLA makes before. `interpret`: True or a
    `plgpu.InterpretGPUParams` to run without a GPU. The interpreter has side effects, with which JAX refuses
    `jax.checkpoint` and `jax.shard_map`; the compiled kernels have none.
    """
    q, k, v, runs, state = vary_alike((q, k, v, runs, state))
    time, value_dim = v.shape[1], v.shape[3]
    features = gpu_features.gpu_features(feature_map, q.shape[3])
    group = round_up(min(chunk_size or GROUP, time), BLOCK)
    spec = Spec(features, group, state is not None, normalize, eps, hopper.interpreter(interpret))
    q, k = (_pad(spec, features.prepare(x), features.width).astype(x.dtype) for x in (q, k))
    v = _pad(spec, v, round_up(value_dim, VALUE_MULTIPLE))
    if runs is not None:
        runs = jnp.pad(runs, ((0, 0), (0, v.shape[1] - time)))
    if state is not None:
        state = _from_public(spec, state, v.shape[3])
    out, last = _linear_attention(spec, q, k, v, runs, state)
    return out[:, :time, :, :value_dim], _to_public(spec, last, value_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_attention(spec, q, k, v, runs, state):
    return _forward(spec, q, k, v, runs, state)[0]


def _forward(spec, q, k, v, runs, state):
    rows, keeps = token_rows(spec, runs)
    past, past_sums, last = states(spec, Tokens(k, v, None, rows, keeps), state, reverse=False)
    out, total = outputs(spec, q, k, v, rows, past, past_sums)
    out, total = keep(out, total)
    return (out, last), (q, k, v, runs, past, past_sums, out, total)


def _backward(spec, saved, cotangents):
    q, k, v, runs, past, past_sums, out, total = saved
    d_out, d_last = cotangents
    rows, keeps = token_rows(spec, runs)
    u, d_total = _gradients_of_sums(spec, d_out, out, total)
    # States come without scales, and their gradients would have them twice.
    squares = _squares(spec)
    d_last = State(d_last.kv / squares[:, None], d_last.sums / squares)
    future, future_sums, d_state = states(
        spec, Tokens(q, u, d_total, rows, keeps), d_last, reverse=True
    )
    inputs = gpu_gradients.Inputs(
        q, k, v, u, d_total, past, past_sums, spec.features.selectors, rows
    )
    dq = query_gradient(spec, inputs)
    dk, dv = key_value_gradients(spec, inputs._replace(state=future, sums=future_sums))
    d_state = State(d_state.kv * squares[:, None], d_state.sums * squares)
    return dq, dk, dv, None, d_state if spec.has_initial else None


_linear_attention.defvjp(_forward, _backward)


def _gradients_of_sums(spec, d_out, out, total):
    """Of numerator and total, where out = numerator / total: like out, and float32 [B, H, T]."""
    if not spec.normalize:
        return d_out, jnp.zeros_like(total)
    by_token = total.swapaxes(1, 2)[..., None]
    u = (d_out.astype(jnp.float32) / by_token).astype(out.dtype)
    # Of the rounded gradient, so that in u · (v - out), the gradient of a weight, the two sides agree.
    d_total = -jnp.sum(u.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    return u, d_total.swapaxes(1, 2)


# Layouts.


def _pad(spec, x, width: int):
    """[B, T, H, D] with T whole groups, and D = `width`."""
    time = -x.shape[1] % spec.group
    return jnp.pad(x, ((0, 0), (0, time), (0, 0), (0, width - x.shape[3])))


def _squares(spec) -> np.ndarray:
    """Squared scales of the kernels' features; 1 for those that are none."""
    squares = spec.features.squared_scales
    return np.where(squares == 0, 1, squares)


def _from_public(spec, state: LinearAttentionState, value_width: int) -> State:
    features = spec.features
    padding = (0, features.padded - features.num_features)
    kv = state.kv / features.scales[:, None]
    kv = jnp.pad(kv, ((0, 0), (0, 0), padding, (0, value_width - kv.shape[3])))
    return State(kv, jnp.pad(state.k_sum / features.scales, ((0, 0), (0, 0), padding)))


def _to_public(spec, state: State, value_dim: int) -> LinearAttentionState:
    scales, count = spec.features.scales, spec.features.num_features
    kv = state.kv[:, :, :count, :value_dim] * scales[:, None]
    return LinearAttentionState(kv, state.sums[:, :, :count] * scales)
