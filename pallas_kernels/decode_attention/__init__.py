"""Attention of a few new tokens to a long cache: signature, validation and dispatch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import check_positive_int
from pallas_kernels.decode_attention import reference, xla
from pallas_kernels.dispatch import call, kernels_or_xla
from pallas_kernels.varying import vary_alike

IMPLEMENTATIONS = kernels_or_xla(
    f"{__name__}.tpu", xla, reference, "decode_attention", f"{__name__}.gpu"
)


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    *,
    page_table: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal softmax attention of the last Tq tokens of each row to the row's cache, which holds them already.

    The time of such a step is the time to read the cache, so that only what a row sees of it is read: `lengths`
    entries, or the window. Where a chip has more cores than there are rows, they share a row's cache and their partial
    softmaxes are merged by their log-sum-exps (Dao et al., "Flash-Decoding", 2023, crfm.stanford.edu). The cache may
    be paged (Kwon et al., "PagedAttention", arXiv 2309.06180). Not differentiable: train with `attention`.

    Args:
        q: float [B, Tq, H, D]; query i of a row is its token `lengths - Tq + i`.
        k_cache: float [B, S, Hkv, D], of q's dtype; H is a multiple of Hkv, and query head h reads key head
            h // (H // Hkv). With `page_table`: [pages, page_size, Hkv, D].
        v_cache: float [B, S, Hkv, Dv], or [pages, page_size, Hkv, Dv].
        lengths: int [B], tokens in the cache of each row, between 0 and S. What lies behind them may be anything.
        page_table: int [B, max_pages]: token j of row b is entry j % page_size of page `page_table[b, j // page_size]`.
            S is then max_pages * page_size. Entries behind a row's length may be anything.
        window: a query sees itself and the `window - 1` tokens before it.
        scale: factor on the logits; 1/sqrt(D) by default.
        logits_soft_cap: c of logits <- c tanh(logits / c), applied after `scale`; None: none.
        return_lse: also return the log-sum-exp of the logits.
        implementation: "tpu" (Pallas, Mosaic), "gpu" (Pallas, Mosaic GPU: Hopper, bfloat16), "xla", "reference",
            or "tpu_interpret" and "gpu_interpret", the kernels run anywhere by Pallas' interpreters; None takes
            the best for this platform and these arguments, and "gpu" only by name.

    Returns:
        out [B, Tq, H, Dv] in v_cache's dtype; with `return_lse` the pair of it and lse [B, Tq, H], float32 (float64
        for float64 inputs). A query that sees nothing (where `lengths < Tq`) has out 0 and lse -inf.

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
        TypeError: it is differentiated.
    """
    _check_arrays(q, k_cache, v_cache)
    _check_tokens(q, k_cache, lengths, page_table)
    _check_options(window, logits_soft_cap)
    lengths, page_table = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), (lengths, page_table))
    arguments = vary_alike((q, k_cache, v_cache, lengths, page_table))
    options = {
        "window": window,
        "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        "logits_soft_cap": None if logits_soft_cap is None else float(logits_soft_cap),
    }
    out, lse = _not_differentiable(
        lambda *arrays: call(
            "decode_attention", IMPLEMENTATIONS, implementation, *arrays, **options
        ),
        *arguments,
    )
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _not_differentiable(function, *arrays):
    return function(*arrays)


@_not_differentiable.defjvp
def _raise(function, primals, tangents):
    raise TypeError("decode_attention is not differentiable; train with pallas_kernels.attention")


def _check_arrays(q, k_cache, v_cache) -> None:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if jnp.ndim(x) != 4:
            raise ValueError(
                f"decode_attention: {name} must have 4 axes [..., H, D], not be of shape {jnp.shape(x)}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"decode_attention: {name} must be floating point, not {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(
                f"decode_attention: {name} has dtype {x.dtype} but q has {q.dtype}; cast one"
            )
        if 0 in x.shape:
            raise ValueError(f"decode_attention: {name} has an axis of size 0: {x.shape}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"decode_attention: k_cache {k_cache.shape} and v_cache {v_cache.shape} must agree in all "
            "axes but the last"
        )
    if q.shape[3] != k_cache.shape[3]:
        raise ValueError(
            f"decode_attention: k_cache has head_dim {k_cache.shape[3]} but q has {q.shape[3]}"
        )
    if q.shape[2] % k_cache.shape[2]:
        raise ValueError(
            f"decode_attention: q has {q.shape[2]} heads, which is no multiple of the "
            f"{k_cache.shape[2]} heads of k_cache"
        )


def _check_tokens(q, k_cache, lengths, page_table) -> None:
    batch = q.shape[0]
    dtype = jnp.result_type(lengths)
    if jnp.shape(lengths) != (batch,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"decode_attention: lengths must be int [B] = [{batch}], not {dtype} {jnp.shape(lengths)}"
        )
    size = k_cache.shape[1]
    if page_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(
                f"decode_attention: k_cache has batch size {k_cache.shape[0]} but q has {batch}; a cache of "
                "pages needs page_table"
            )
    else:
        shape = jnp.shape(page_table)
        if len(shape) != 2 or shape[0] != batch or 0 in shape:
            raise ValueError(
                f"decode_attention: page_table must be [B, max_pages] = [{batch}, ...], not {shape}"
            )
        if not jnp.issubdtype(page_table.dtype, jnp.integer):
            raise ValueError(
                f"decode_attention: page_table must be integer, not {page_table.dtype}"
            )
        size *= shape[1]
    if not isinstance(lengths, jax.core.Tracer):
        low, high = np.min(lengths), np.max(lengths)
        if low < 0 or high > size:
            raise ValueError(
                f"decode_attention: lengths must be in 0..{size}, what the cache holds, not {low}..{high}"
            )


def _check_options(window, logits_soft_cap) -> None:
    check_positive_int("decode_attention", "window", window)
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(
            f"decode_attention: logits_soft_cap must be positive or None, not {logits_soft_cap!r}"
        )
