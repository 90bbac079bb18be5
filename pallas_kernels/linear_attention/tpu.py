"""Linear attention on TPU (Pallas, Mosaic): the chunked form with the state in VMEM.

Here are layout, grids and the custom VJP; `tpu_chunk` and `tpu_backward` have the kernels, `tpu_features` the feature
maps as they compute them, `tpu_blocks` the sizes. For the backward, and only then, the forward keeps the state before
each chunk in the dtype in which the matrix unit takes it, so that one kernel makes all gradients.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target
from pallas_kernels.linear_attention import tpu_backward, tpu_chunk
from pallas_kernels.linear_attention.state import LinearAttentionState
from pallas_kernels.linear_attention.tpu_blocks import LANES, VMEM_LIMIT, blocks, ones_rows
from pallas_kernels.linear_attention.tpu_chunk import Spec
from pallas_kernels.linear_attention.tpu_features import cannot_trace, kernel_features
from pallas_kernels.residuals import keep
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import interpreter, shaped_like, vary_alike


def refuses(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state
) -> str | None:
    """What the kernels cannot do."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}; the kernels take float32 and bfloat16"
    reason = cannot_trace(feature_map, q.shape[-1])
    if reason is not None:
        return f"feature_map.expand cannot be part of a kernel: {reason}"
    if _blocks(q, v, feature_map, chunk_size) is None:
        count = feature_map.num_features(q.shape[-1])
        reason = f"a state of {count} features x {v.shape[-1]} values does not fit into VMEM"
        return reason if chunk_size is None else f"{reason} beside a chunk of {chunk_size} tokens"
    return None


def linear_attention(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state, interpret=False
):
    """Returns `(out [B, T, H, Dv], LinearAttentionState or None)`; see the package for the arguments.

    A chunk is a multiple of 128 tokens: `chunk_size` is rounded up. `interpret`: as `pallas_call` takes it.
    """
    q, k, v, runs, state = vary_alike((q, k, v, runs, state))
    time, value_dim = v.shape[1], v.shape[3]
    features = kernel_features(feature_map, q.shape[-1])
    sizes = _blocks(q, v, feature_map, chunk_size)
    spec = Spec(
        features, sizes, v.shape[2], time, normalize, eps, return_state, interpreter(interpret, q)
    )
    q, k = (_to_kernel(spec, x, features.dim) for x in (q, k))
    padded_values = value_dim + -value_dim % ones_rows(v.dtype)
    v = _to_kernel(spec, v, padded_values)
    rows = None if runs is None else segment_rows(spec, runs)
    if state is not None:
        state = features.from_public(_pack(state, padded_values, ones_rows(v.dtype)))
    out, last = _linear_attention(spec, q, k, v, rows, state)
    by_token = (*out.shape[:2], spec.heads, padded_values)
    out = out.reshape(by_token) if sizes.turns(padded_values) else out.transpose(0, 3, 1, 2)
    out = out[:, :time, :, :value_dim]
    if last is None:
        return out, None
    last = features.to_public(last)
    kv, k_sum = last[:, :, :value_dim].swapaxes(2, 3), last[:, :, padded_values]
    return out, LinearAttentionState(kv, k_sum)


def _blocks(q, v, feature_map, chunk_size):
    features = kernel_features(feature_map, q.shape[-1])
    return blocks(
        batch=q.shape[0],
        time=q.shape[1],
        heads=q.shape[2],
        dim=features.dim,
        value_dim=v.shape[3] + -v.shape[3] % ones_rows(v.dtype),
        num_features=features.num_features,
        dtype=q.dtype,
        device_kind=target().device_kind,
        chunk_size=chunk_size,
    )


def segment_rows(spec: Spec, runs):
    """What the kernels know of segments, each a row that they multiply with: int [B, T] -> float32 [B, 4, T].

    The rows: the run of each token; whether it is that of the state before its chunk; whether it is that of the state
    after; whether these two are the same. The state is of the last run that began, at first of run 1.
    """
    chunk = spec.blocks.chunk
    runs = jnp.pad(runs, ((0, 0), (0, -runs.shape[1] % spec.blocks.tokens)))
    by_chunk = runs.reshape(runs.shape[0], -1, chunk)
    after = jnp.maximum(jax.lax.cummax(by_chunk.max(axis=2), axis=1), 1)
    before = jnp.pad(after[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    before, after = (jnp.repeat(x, chunk, axis=1) for x in (before, after))
    rows = jnp.stack([runs, runs == before, runs == after, before == after], axis=1)
    return rows.astype(jnp.float32)


def _to_kernel(spec, x, dim: int):
    """[B, T, H, D] -> [B, H, dim, whole blocks of T], or for kernels that turn [B, T, H * dim]; zeros fill up."""
    time = -x.shape[1] % spec.blocks.tokens
    padding = ((0, 0), (0, time), (0, 0), (0, dim - x.shape[3]))
    x = jnp.pad(x, padding)
    return x.reshape(*x.shape[:2], -1) if spec.blocks.turns(dim) else x.transpose(0, 2, 3, 1)


def _pack(state, value_dim: int, ones: int):
    """kv [B, H, F, Dv] over k_sum [B, H, F] -> [B, H, value_dim + ones, F]."""
    kv = state.kv.swapaxes(2, 3)
    values = jnp.pad(kv, ((0, 0), (0, 0), (0, value_dim - kv.shape[2]), (0, 0)))
    total = jnp.pad(state.k_sum[:, :, None], ((0, 0), (0, 0), (0, ones - 1), (0, 0)))
    return jnp.concatenate([values, total], axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_attention(spec, q, k, v, rows, state):
    out, _, last, _ = _call_forward(spec, q, k, v, rows, state, is_differentiated=False)
    return out, last


def _forward(spec, q, k, v, rows, state):
    out, total, last, pasts = _call_forward(spec, q, k, v, rows, state, is_differentiated=True)
    out, total, pasts = keep(out, total, pasts)
    return (out, last), (q, k, v, rows, state, out, total, pasts)


def _call_forward(spec, q, k, v, rows, state, *, is_differentiated):
    batch, dim, time = _sizes(spec, v)
    carry = (dim + ones_rows(v.dtype), spec.features.num_features)
    last = shaped_like(v, (batch, spec.heads, *carry), jnp.float32)
    total = shaped_like(v, (batch, spec.heads, 1, time), jnp.float32)
    pasts = shaped_like(v, (batch, spec.heads, time // spec.blocks.chunk, *carry))
    return _call(
        spec,
        tpu_chunk.forward,
        [(q, "tokens"), (k, "tokens"), (v, "tokens"), (rows, "rows"), (state, "state")],
        [
            (shaped_like(v), "tokens"),
            (total if is_differentiated else None, "by head"),
            (last if spec.return_state else None, "state"),
            (pasts if is_differentiated else None, "pasts"),
        ],
        carry,
    )


def _backward(spec, saved, cotangents):
    q, k, v, rows, state, out, total, pasts = saved
    d_out, d_last = cotangents
    if not spec.normalize:
        out = total = None
    d_last = None if d_last is None else d_last.swapaxes(2, 3)
    *heads, _, channels, num_features = pasts.shape
    carry = (num_features, channels)
    d_state = shaped_like(v, (*heads, *carry), jnp.float32)
    dq, dk, dv, d_state = _call(
        spec,
        tpu_backward.backward,
        [
            (q, "tokens"),
            (k, "tokens"),
            (v, "tokens"),
            (rows, "rows"),
            (pasts, "pasts"),
            (d_last, "state"),
            (d_out, "tokens"),
            (out, "tokens"),
            (total, "by head"),
        ],
        [
            (shaped_like(q), "tokens"),
            (shaped_like(k), "tokens"),
            (shaped_like(v), "tokens"),
            (None if state is None else d_state, "state"),
        ],
        carry,
        reverse=True,
    )
    d_rows = None if rows is None else jnp.zeros_like(rows)
    return dq, dk, dv, d_rows, None if state is None else d_state.swapaxes(2, 3)


_linear_attention.defvjp(_forward, _backward)


def _sizes(spec, v) -> tuple[int, int, int]:
    """Batch, E and T of values in the kernels' layout."""
    if v.ndim == 3:
        batch, time, channels = v.shape
        return batch, channels // spec.heads, time
    batch, _, dim, time = v.shape
    return batch, dim, time


def _call(spec, kernel, inputs, outputs, carry, reverse=False):
    """Runs `kernel` on a grid of (blocks of sequences, of heads, of tokens).

    Inputs and outputs are pairs of an array (or shape, or None) and what it holds: "tokens", as `_to_kernel` makes
    them, "by head" [B, H, rows, T] and "pasts" [B, H, chunks, ., .] are cut into blocks of heads and tokens, "rows"
    [B, rows, T] of tokens, "state" [B, H, ., .] of heads. `carry`: the shape of the state that travels, a head.
    `reverse`: the last tokens come first.
    """
    batch, _, time = _sizes(spec, inputs[2][0])
    steps, sizes = time // spec.blocks.tokens, spec.blocks
    ring = (sizes.chunk // LANES, max(1, spec.features.scratch_rows), LANES)
    turn = tpu_chunk.chunks_of_turn(sizes, inputs[2][0].dtype)

    def block_spec(array, holds):
        if array is None:
            return None

        def block(t):
            return steps - 1 - t if reverse else t

        if holds == "state":
            return pl.BlockSpec(
                (sizes.sequences, sizes.heads, *array.shape[2:]), lambda b, h, t: (b, h, 0, 0)
            )
        if holds == "pasts":
            shape = (sizes.sequences, sizes.heads, sizes.tokens // sizes.chunk, *array.shape[3:])
            return pl.BlockSpec(shape, lambda b, h, t: (b, h, block(t), 0, 0))
        if holds == "rows":
            shape = (sizes.sequences, array.shape[1], sizes.tokens)
            return pl.BlockSpec(shape, lambda b, h, t: (b, 0, block(t)))
        if holds == "tokens" and array.ndim == 3:
            shape = (sizes.sequences, sizes.tokens, array.shape[2] // spec.heads * sizes.heads)
            return pl.BlockSpec(shape, lambda b, h, t: (b, block(t), h))
        shape = (sizes.sequences, sizes.heads, array.shape[2], sizes.tokens)
        return pl.BlockSpec(shape, lambda b, h, t: (b, h, 0, block(t)))

    return tpu_call(
        functools.partial(kernel, spec),
        grid=(batch // sizes.sequences, spec.heads // sizes.heads, steps),
        in_specs=[block_spec(*x) for x in inputs],
        out_specs=[block_spec(*x) for x in outputs],
        out_shape=[x for x, _ in outputs],
        scratch_shapes=[
            pltpu.VMEM((sizes.sequences, sizes.heads, *carry), jnp.float32),
            pltpu.VMEM((2, turn, sizes.sequences, sizes.heads, *ring), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=spec.interpret,
        name=f"linear_attention_{kernel.__name__}",
    )(*(x for x, _ in inputs))
