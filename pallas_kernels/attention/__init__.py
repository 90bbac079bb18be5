"""Attention: signature, validation and dispatch; the implementations are files of their own."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference, ring, xla
from pallas_kernels.attention.mask import Mask, Tokens
from pallas_kernels.checks import check_positive_int, check_soft_cap
from pallas_kernels.dispatch import kernels_or_xla, select
from pallas_kernels.residuals import keep

IMPLEMENTATIONS = kernels_or_xla(
    f"{__name__}.tpu",
    xla,
    reference,
    "attention",
    gpu=f"{__name__}.gpu",
    triton=f"{__name__}.triton",
)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention with grouped-query heads, softmax(scale q kᵀ) v over the keys that a query may see.

    Memory is linear in time, forward and backward: the T x T weights are recomputed tile by tile from the
    log-sum-exp (Dao, "FlashAttention-2", arXiv 2307.08691, algorithms 1 and 2). Differentiable in q, k and v,
    through the log-sum-exp too.

    Args:
        q: float [B, Tq, H, D].
        k: float [B, Tk, Hkv, D]; H is a multiple of Hkv, and query head h reads key head h // (H // Hkv).
        v: float [B, Tk, Hkv, Dv].
        causal: a query sees no key of a later position.
        window: a query sees itself and the `window - 1` positions before it. Only with `causal=True`.
        segment_ids: int [B, T] for queries and keys alike (Tq = Tk), or a pair (int [B, Tq], int [B, Tk]).
            Tokens see only tokens of the same id; id 0 is padding and sees nothing.
        positions: None for index order, where the queries are aligned to the end of the keys when Tq != Tk
            (query i has position i + Tk - Tq); or a pair (int [B, Tq], int [B, Tk]) that `causal` and
            `window` then compare, in any order.
        scale: factor on the logits; 1/sqrt(D) by default.
        logits_soft_cap: c of logits <- c tanh(logits / c), applied after `scale`; None: none.
        return_lse: also return the log-sum-exp of the logits.
        axis_name: inside of `jax.shard_map`, the mesh axis that time is split over: each device has its share of the
            queries and of the keys, in the order of the axis, and the queries see the keys of all (`ring`). None: every
            device has all of its keys.
        implementation: "tpu" (Pallas, Mosaic), "gpu" (Pallas, Mosaic GPU: Hopper, bfloat16), "triton" (Triton: GPUs
            since Ampere), "xla", "reference", or "tpu_interpret", "gpu_interpret" and "triton_interpret", the
            kernels run anywhere by the interpreters of Pallas and Triton; None takes the best for this platform and
            these arguments, "gpu" and "triton" only by name.

    Returns:
        out [B, Tq, H, Dv] in v's dtype; with `return_lse` the pair of it and lse [B, Tq, H], float32 (float64
        for float64 inputs). A query that sees no key has out 0, lse -inf and zero gradients.

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    _check_arrays(q, k, v)
    _check_options(causal, window, logits_soft_cap)
    # Or rotary embeddings and norms would be computed again for the backward pass.
    q, k, v = keep(q, k, v)
    segments = _pair("segment_ids", segment_ids, q, k) or (None, None)
    positions = _pair("positions", positions, q, k) or (None, None)
    queries, keys = map(Tokens, positions, segments)
    attend = functools.partial(
        _attend,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        logits_soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        implementation=implementation,
    )
    if axis_name is not None:
        attend = functools.partial(ring.attention, attend, axis_name=axis_name)
    out, lse = attend(q, k, v, queries, keys, causal=causal, window=window)
    return (out, lse) if return_lse else out


def _attend(
    q, k, v, queries: Tokens, keys: Tokens, *, causal, window, implementation, known=None, **options
):
    """`(out, lse)`; where the tokens have no positions, these are in index order.

    `known`: `(out, lse)` over these and more keys. It is what is returned then, at no cost, with the gradients that
    belong to these keys: weights come from the log-sum-exp, so that these add up over all keys.
    """
    is_ordered = queries.position is None
    if is_ordered:
        queries, keys = (
            tokens._replace(position=jnp.arange(-x.shape[1], 0, dtype=jnp.int32)[None])
            for tokens, x in ((queries, q), (keys, k))
        )
    mask = Mask(q.shape[1], k.shape[1], causal, window, is_ordered)
    options["mask"] = mask
    arguments = q, k, v, queries, keys
    function = select("attention", IMPLEMENTATIONS, implementation, *arguments, **options)
    return function(*arguments, known=known, **options)


def _check_arrays(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) != 4:
            raise ValueError(f"attention: {name} must be [B, T, H, D], not of shape {jnp.shape(x)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"attention: {name} must be floating point, not {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"attention: {name} has dtype {x.dtype} but q has {q.dtype}; cast one")
        if 0 in x.shape:
            raise ValueError(f"attention: {name} has an axis of size 0: {x.shape}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attention: k {k.shape} and v {v.shape} must agree in [B, Tk, Hkv]")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: k has batch size {k.shape[0]} but q has {q.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: k has head_dim {k.shape[3]} but q has {q.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q has {q.shape[2]} heads, which is no multiple of the {k.shape[2]} heads of k"
        )


def _check_options(causal, window, logits_soft_cap) -> None:
    if window is not None and not causal:
        raise ValueError(
            f"attention: window={window!r} is defined for causal=True only (it counts back in time)"
        )
    check_positive_int("attention", "window", window)
    check_soft_cap("attention", logits_soft_cap)


def _pair(name, value, q, k) -> tuple[jax.Array, jax.Array] | None:
    """Segment ids or positions as a pair (queries', keys') of int32 arrays."""
    if value is None:
        return None
    if not isinstance(value, tuple | list):
        if name == "positions":
            raise ValueError(
                "attention: positions must be a pair (int [B, Tq], int [B, Tk]) or None"
            )
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"attention: segment_ids must be a pair where Tq={q.shape[1]} and Tk={k.shape[1]} differ"
            )
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"attention: {name} must have 2 entries (queries, keys), not {len(value)}")
    for side, entry, x in zip(("queries", "keys"), value, (q, k), strict=True):
        if jnp.shape(entry) != x.shape[:2]:
            raise ValueError(
                f"attention: {name} of the {side} must be of shape {x.shape[:2]}, not {jnp.shape(entry)}"
            )
        if not jnp.issubdtype(jnp.result_type(entry), jnp.integer):
            raise ValueError(
                f"attention: {name} of the {side} must be integer, not {jnp.result_type(entry)}"
            )
    return tuple(jnp.asarray(entry, jnp.int32) for entry in value)
