"""Linear attention for NVIDIA GPUs since Ampere (Triton): the chunked form with states in HBM, features in registers.

Here are the arguments of the kernels and the custom VJP; `triton_chunk` has the kernels, `triton_features` the feature
maps as they compute them. The backward keeps q, k, v, out and the sums of the weights; it makes the states again.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import triton_call
from pallas_kernels.linear_attention import triton_blocks, triton_chunk, triton_features
from pallas_kernels.linear_attention.feature_maps import FEATURE_MAPS
from pallas_kernels.linear_attention.state import LinearAttentionState
from pallas_kernels.linear_attention.triton_features import Spec
from pallas_kernels.residuals import keep
from pallas_kernels.triton_tiles import Heads
from pallas_kernels.varying import vary_alike

# float16 would not hold the states of long sequences.
DTYPES = ("bfloat16", "float32")


def refuses(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state
) -> str | None:
    """What the kernels cannot do with these arguments, or None."""
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}; it takes {', '.join(DTYPES)}"
    if triton_blocks.of(q, v) is None:
        most = max(triton_blocks.TABLE[q.dtype.itemsize])
        return f"D + Dv of {q.shape[3] + v.shape[3]}; it takes up to {most} in {q.dtype}"
    if triton_features.name_of(feature_map) is None:
        return f"a feature map of your own; it takes {', '.join(FEATURE_MAPS)}"
    return None


def linear_attention(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state, interpret=False
):
    """Returns `(out [B, T, H, Dv], LinearAttentionState)`, wanted or not; see the package for the arguments.

    A chunk is a multiple of 64 tokens: `chunk_size` is rounded up. `interpret`: run without a GPU, by Triton's
    interpreter.
    """
    name = triton_features.name_of(feature_map)
    spec = Spec(
        q=Heads.of(q),
        v=Heads.of(v),
        feature_map=name,
        chunk=triton_blocks.chunk(q.shape[1], feature_map.num_features(q.shape[3]), chunk_size),
        blocks=triton_blocks.of(q, v),
        has_initial=state is not None,
        normalize=normalize,
        eps=eps,
    )
    out, state = _linear_attention(spec, interpret, *vary_alike((q, k, v, runs, state)))
    return out, LinearAttentionState(*state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_attention(spec, interpret, q, k, v, runs, state):
    return _forward(spec, interpret, q, k, v, runs, state)[0]


def _forward(spec: Spec, interpret, q, k, v, runs, state):
    segments = (runs, _chunk_runs(spec, runs))
    states, last = _states(spec, interpret, k, v, None, segments, state, reverse=False)
    out, total = _call(
        spec,
        interpret,
        triton_chunk.linear_attention_outputs,
        (q, k, v, *segments, *states),
        (v, jax.ShapeDtypeStruct((v.shape[0], *_by_head(q)), jnp.float32)),
        spec.num_blocks,
    )
    out, total = keep(out, total)
    return (out, last), (q, k, v, runs, state, out, total)


def _backward(spec: Spec, interpret, saved, cotangents):
    q, k, v, runs, state, out, total = saved
    d_out, d_last = cotangents
    segments = (runs, _chunk_runs(spec, runs))
    d_sums, d_total = _gradient_of_sums(spec, d_out, out, total)
    # Nothing of the states is kept since the forward but what came in.
    states, _ = _states(spec, interpret, k, v, None, segments, state, reverse=False)
    d_states, d_state = _states(spec, interpret, q, d_sums, d_total, segments, d_last, reverse=True)
    gradient = functools.partial(_call, spec, interpret)
    arrays = (q, k, v, d_sums, d_total, *segments)
    (dq,) = gradient(
        triton_chunk.linear_attention_queries_gradient, (*arrays, *states), (q,), spec.num_blocks
    )
    dk, dv = gradient(
        triton_chunk.linear_attention_keys_gradient, (*arrays, *d_states), (k, v), spec.num_blocks
    )
    return dq, dk, dv, None, None if state is None else type(state)(*d_state)


_linear_attention.defvjp(_forward, _backward)


def _chunk_runs(spec: Spec, runs):
    """The run that the state before each chunk is of, and the last state: int [B, T] -> int32 [B, chunks + 1].

    A state is of the last run that began, at first of run 1.
    """
    if runs is None:
        return None
    padded = jnp.pad(runs, ((0, 0), (0, -runs.shape[1] % spec.chunk)))
    of_chunks = padded.reshape(runs.shape[0], spec.num_chunks, spec.chunk).max(axis=2)
    after = jnp.maximum(jax.lax.cummax(of_chunks, axis=1), 1)
    return jnp.pad(after, ((0, 0), (1, 0)), constant_values=1)


def _gradient_of_sums(spec: Spec, d_out, out, total):
    """Of out = sums / total: gradients of the sums [B, T, H, Dv] and of the total, float32 [B, H, T]."""
    if not spec.normalize:
        return d_out, jnp.zeros_like(total)
    inverse = 1 / total
    products = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_sums = d_out * inverse.swapaxes(1, 2)[..., None]
    return d_sums.astype(d_out.dtype), -products.swapaxes(1, 2) * inverse


def _by_head(x) -> tuple[int, int]:
    return x.shape[2], x.shape[1]


def _states(spec: Spec, interpret, x, y, weights, segments, initial, reverse: bool):
    """States before every chunk and their sums, and the pair of the last ones."""
    batch, heads = x.shape[0], x.shape[2]
    shape = (spec.num_features, spec.v.dim)

    def output(dtype, *axes):
        return jax.ShapeDtypeStruct((batch, heads, *axes), dtype)

    *states, last, last_sum = _call(
        spec,
        interpret,
        triton_chunk.linear_attention_states,
        (x, y, weights, *segments, *((None, None) if initial is None else initial)),
        (
            output(x.dtype, spec.num_chunks, *shape),
            output(jnp.float32, spec.num_chunks, spec.num_features),
            output(jnp.float32, *shape),
            output(jnp.float32, spec.num_features),
        ),
        spec.num_feature_blocks * spec.num_value_blocks,
        reverse=reverse,
    )
    return states, (last, last_sum)


def _call(spec: Spec, interpret, kernel, arguments, out, programs_of_head: int, **constants):
    """Runs a kernel whose outputs have the shapes and dtypes of `out`."""
    return triton_call.call(
        kernel,
        arguments,
        out=[jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in out],
        programs=programs_of_head * spec.q.heads,
        constants={"s": spec, **constants},
        launch=spec.blocks.launch,
        interpret=interpret,
    )
