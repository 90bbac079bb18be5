"""Attention written out: a masked T x T softmax in the dtype of its inputs (float64 too)."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Mask, Tokens


def attention(
    q, k, v, queries: Tokens, keys: Tokens, *, mask: Mask, scale, logits_soft_cap, known=None
):
    """softmax(cap(scale q kᵀ) where allowed) v. Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`, or `known`."""
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
    if known is not None:
        return _as_known(known, logits, allowed, v_wide)
    highest = logits.max(axis=-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(logits - highest), 0)
    total = jnp.where(empty, 1, weights.sum(axis=-1, keepdims=True))

    out = jnp.einsum("bhqk,bkhd->bqhd", weights / total, v_wide, precision="highest")
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(total))[..., 0]
    return out.astype(v.dtype), lse.swapaxes(1, 2)


def _as_known(known, logits, allowed, v):
    """`known`, which changes with the logits and v of these keys as what they were a part of would."""
    out, lse = known
    finite = jnp.where(jnp.isneginf(lse), 0, lse).swapaxes(1, 2)[..., None]
    weights = jnp.where(allowed, jnp.exp(logits - jax.lax.stop_gradient(finite)), 0)
    d_lse = weights.sum(axis=-1).swapaxes(1, 2)
    d_out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
    d_out = d_out - jax.lax.stop_gradient(out) * d_lse[..., None]
    return tuple(
        x + (change - jax.lax.stop_gradient(change)).astype(x.dtype)
        for x, change in ((out, d_out), (lse, d_lse))
    )
