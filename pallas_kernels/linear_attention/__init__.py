"""Linear attention: signatures, validation and dispatch; the implementations are files of their own."""

import jax
import jax.numpy as jnp

from pallas_kernels.carried import across_shards
from pallas_kernels.checks import check_positive_int, check_segment_ids
from pallas_kernels.dispatch import call, kernels_or_xla
from pallas_kernels.linear_attention import feature_maps, reference, xla
from pallas_kernels.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap
from pallas_kernels.linear_attention.state import LinearAttentionState, step
from pallas_kernels.segments import runs

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "LinearAttentionState",
    "linear_attention",
    "linear_attention_decode",
]

IMPLEMENTATIONS = kernels_or_xla(
    f"{__name__}.tpu",
    xla,
    reference,
    "linear_attention",
    gpu=f"{__name__}.gpu",
    triton=f"{__name__}.triton",
)


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    feature_map: str | FeatureMap = "taylor",
    chunk_size: int | None = None,
    segment_ids: jax.Array | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, LinearAttentionState]:
    """Causal linear attention, out_t = Σ_{s<=t} w_ts v_s / (Σ_{s<=t} w_ts + eps) with w_ts = φ(q_t) · φ(k_s).

    Memory is linear in time, forward and backward: quadratic inside a chunk, a state of constant size between
    chunks. Differentiable in q, k, v and the initial state. Arora et al., "Simple linear attention language
    models balance the recall-throughput tradeoff" (BASED), arXiv 2402.18668; Katharopoulos et al., "Transformers
    are RNNs", arXiv 2006.16236.

    Args:
        q: float [B, T, H, D].
        k: float [B, T, H, D].
        v: float [B, T, H, Dv].
        feature_map: "taylor" (w = 1 + x + x²/2 with x = q · k / sqrt(D)), "identity", "elu+1", "softplus", or a
            `FeatureMap`.
        chunk_size: tokens a chunk; None: chosen by the implementation.
        segment_ids: int [B, T]; tokens see only tokens of their own segment, and id 0 is padding, which sees
            nothing, is seen by nothing and has out 0. A segment is a run of one id; padding inside does not end it.
        normalize: divide by the sum of the weights; False: the numerator alone. Weights of "identity" can be
            negative, so that their sum means little.
        eps: added to the sum of the weights; positive, so that padding, which sees nothing, has out 0.
        initial_state: state of the tokens before, which are of the first segment of each row; None: none.
        return_state: also return the state after the last token, which is that of the last segment of each row.
        axis_name: inside of `jax.shard_map`, the mesh axis that time is split over: each device has its share of the
            tokens, in the order of the axis, and the states pass between them (`pallas_kernels.carried`), at twice the
            work. `initial_state` and the returned state are those before the first and after the last token of all,
            the same on every device. None: every device has whole rows.
        implementation: "tpu" (Pallas, Mosaic), "gpu" (Pallas, Mosaic GPU: Hopper, bfloat16), "triton" (Triton: GPUs
            since Ampere), "xla", "reference", or "tpu_interpret", "gpu_interpret" and "triton_interpret", the
            kernels run anywhere by the interpreters of Pallas and Triton; None takes the best for this platform and
            these arguments, "gpu" and "triton" only by name.

    Returns:
        out [B, T, H, Dv] in v's dtype; with `return_state` the pair of it and a `LinearAttentionState`.

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    _check_arrays(q, k, v, ndim=4, axes="[B, T, H, D]")
    _check_options(chunk_size, eps)
    if segment_ids is not None:
        check_segment_ids("linear_attention", segment_ids, q.shape[:2])
    feature_map = feature_maps.get(feature_map)
    state = initial_state
    if state is not None:
        state = _check_state(state, q, v, feature_map)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)

    def scan(state):
        return call(
            "linear_attention",
            IMPLEMENTATIONS,
            implementation,
            q,
            k,
            v,
            None if segment_ids is None else runs(segment_ids),
            state,
            feature_map=feature_map,
            chunk_size=chunk_size,
            normalize=normalize,
            eps=float(eps),
            return_state=return_state or axis_name is not None,
        )

    if axis_name is None:
        out, state = scan(state)
    else:
        if state is None:
            dtype = jnp.promote_types(q.dtype, jnp.float32)
            heads = (q.shape[0], *q.shape[2:], v.shape[3])
            state = LinearAttentionState.zeros(*heads, feature_map, dtype)
        kept = jax.tree.map(lambda x: jnp.ones((), x.dtype), state)
        out, state = across_shards(scan, state, segment_ids, axis_name, decay=kept)
    return (out, state) if return_state else out


def linear_attention_decode(
    state: LinearAttentionState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    feature_map: str | FeatureMap = "taylor",
    normalize: bool = True,
    eps: float = 1e-12,
) -> tuple[jax.Array, LinearAttentionState]:
    """One token of `linear_attention`, in time and memory that do not depend on how many came before.

    Args:
        state: what `linear_attention(..., return_state=True)`, `LinearAttentionState.zeros` or this returned.
        q: float [B, H, D] or [B, 1, H, D].
        k: float, of q's shape.
        v: float [B, H, Dv] or [B, 1, H, Dv].
        feature_map: as in `linear_attention`.
        normalize: as in `linear_attention`.
        eps: as in `linear_attention`.

    Returns:
        `(out, state)`; out is of v's shape and dtype.

    Raises:
        ValueError: an argument is malformed.
    """
    _check_options(None, eps)
    has_time = jnp.ndim(q) == 4
    if has_time:
        if q.shape[1] != 1:
            raise ValueError(f"linear_attention_decode: q must hold one token, not {q.shape[1]}")
        _check_arrays(q, k, v, ndim=4, axes="[B, 1, H, D]")
        q, k, v = (x[:, 0] for x in (q, k, v))
    else:
        _check_arrays(q, k, v, ndim=3, axes="[B, H, D]")
    feature_map = feature_maps.get(feature_map)
    state = _check_state(state, q, v, feature_map)
    out, state = step(state, q, k, v, feature_map=feature_map, normalize=normalize, eps=eps)
    return (out[:, None] if has_time else out), state


def _check_arrays(q, k, v, *, ndim: int, axes: str) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) != ndim:
            raise ValueError(
                f"linear_attention: {name} must be {axes}, not of shape {jnp.shape(x)}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"linear_attention: {name} must be floating point, not {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"linear_attention: {name} has dtype {x.dtype} but q has {q.dtype}")
        if 0 in x.shape:
            raise ValueError(f"linear_attention: {name} has an axis of size 0: {x.shape}")
    if k.shape != q.shape:
        raise ValueError(f"linear_attention: k must be of q's shape {q.shape}, not {k.shape}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"linear_attention: v {v.shape} must agree with q {q.shape} but in the last axis"
        )


def _check_options(chunk_size, eps) -> None:
    check_positive_int("linear_attention", "chunk_size", chunk_size)
    if not eps > 0:  # padding sees nothing, and is 0 / eps
        raise ValueError(f"linear_attention: eps must be positive, not {eps!r}")


def _check_state(state, q, v, feature_map) -> LinearAttentionState:
    """The state in the dtype of the computation."""
    expected = (q.shape[0], q.shape[-2], feature_map.num_features(q.shape[-1]))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    if jnp.shape(state.kv) != (*expected, v.shape[-1]) or jnp.shape(state.k_sum) != expected:
        raise ValueError(
            f"linear_attention: the state must have kv {(*expected, v.shape[-1])} and k_sum {expected}, "
            f"not {jnp.shape(state.kv)} and {jnp.shape(state.k_sum)}"
        )
    return LinearAttentionState(state.kv.astype(dtype), state.k_sum.astype(dtype))
