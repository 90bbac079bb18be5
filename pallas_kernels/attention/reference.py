"""Attention written out: a masked T x T softmax in the dtype of its inputs (float64 too)."""

import jax.numpy as jnp

from pallas_kernels.attention.mask import Mask, Tokens


def attention(q, k, v, queries: Tokens, keys: Tokens, *, mask: Mask, scale, logits_soft_cap):
    """softmax(cap(scale q kᵀ) where allowed) v. Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`."""
    group = q.shape[2] // k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v_wide = (x.astype(dtype) for x in (q, k, v))
    k, v_wide = jnp.repeat(k, group, axis=2), jnp.repeat(v_wide, group, axis=2)

    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    allowed = mask.allowed(queries.as_rows(), keys.as_columns())[:, None]
    # A row that sees nothing keeps finite logits, so that its gradients are 0 and not NaN.
    empty = ~allowed.any(axis=-1, keepdims=True)
    logits = jnp.where(allowed, logits, jnp.where(empty, 0, -jnp.inf))
    highest = logits.max(axis=-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(logits - highest), 0)
    total = jnp.where(empty, 1, weights.sum(axis=-1, keepdims=True))

    out = jnp.einsum("bhqk,bkhd->bqhd", weights / total, v_wide, precision="highest")
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(total))[..., 0]
    return out.astype(v.dtype), lse.swapaxes(1, 2)
