"""Attention to a cache written out: the whole cache under a mask, in the dtype of the inputs (float64 too)."""

import jax.numpy as jnp


def decode_attention(q, k_cache, v_cache, lengths, page_table, *, window, scale, logits_soft_cap):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`; see the package for the arguments."""
    if page_table is not None:
        # [B, max_pages, page_size, Hkv, D]: pages side by side are a cache.
        k_cache, v_cache = (
            jnp.take(x, page_table, axis=0, mode="clip").reshape(len(q), -1, *x.shape[2:])
            for x in (k_cache, v_cache)
        )
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    group = q.shape[2] // k_cache.shape[2]
    key = jnp.arange(k_cache.shape[1])
    position = lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    # Where a product with 0 would not do: the cache behind a row's length may hold NaN.
    is_token = (key < lengths[:, None])[..., None, None]
    k, v = (
        jnp.repeat(jnp.where(is_token, x, 0).astype(dtype), group, axis=2)
        for x in (k_cache, v_cache)
    )

    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q.astype(dtype), k, precision="highest")
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    distance = position[:, None, :, None] - key
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    empty = ~allowed.any(axis=-1, keepdims=True)
    logits = jnp.where(allowed, logits, jnp.where(empty, 0, -jnp.inf))
    highest = logits.max(axis=-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(logits - highest), 0)
    total = jnp.where(empty, 1, weights.sum(axis=-1, keepdims=True))
    out = jnp.einsum("bhqk,bkhd->bqhd", weights / total, v, precision="highest")
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(total))[..., 0]
    return out.astype(v_cache.dtype), lse.swapaxes(1, 2)
