"""Linear attention written out: the T x T weights φ(q) · φ(k), masked, in the dtype of the inputs (float64 too)."""

import jax.numpy as jnp

from pallas_kernels.linear_attention.state import LinearAttentionState


def linear_attention(
    q, k, v, runs, state, *, feature_map, chunk_size, normalize, eps, return_state
):
    """Returns `(out [B, T, H, Dv], LinearAttentionState)`, which needs no chunks and has a state, wanted or not."""
    del chunk_size, return_state
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k = (
        feature_map.expand(x.astype(dtype).transpose(0, 2, 3, 1)) for x in (q, k)
    )  # [B, H, F, T]
    v_wide = v.astype(dtype)
    if state is None:
        batch, heads, features, _ = q.shape
        state = LinearAttentionState(
            jnp.zeros((batch, heads, features, v.shape[-1]), dtype),
            jnp.zeros((batch, heads, features), dtype),
        )
    if runs is None:
        runs = jnp.ones((v.shape[0], v.shape[1]), jnp.int32)

    allowed = jnp.tril((runs[:, :, None] == runs[:, None, :]) & (runs != 0)[:, :, None])
    weights = jnp.einsum("bhft,bhfs->bhts", q, k, precision="highest") * allowed[:, None]
    numerator = jnp.einsum("bhts,bshe->bthe", weights, v_wide, precision="highest")
    denominator = weights.sum(axis=-1).swapaxes(1, 2)

    # The given state belongs to the first segment, and the last segment leaves its own.
    q *= (runs == 1)[:, None, None]
    numerator += jnp.einsum("bhft,bhfe->bthe", q, state.kv, precision="highest")
    denominator += jnp.einsum("bhft,bhf->bth", q, state.k_sum, precision="highest")
    last = jnp.maximum(runs.max(axis=1), 1)
    k *= (runs == last[:, None])[:, None, None]
    keep = (last == 1)[:, None, None]
    state = LinearAttentionState(
        keep[..., None] * state.kv + jnp.einsum("bhfs,bshe->bhfe", k, v_wide, precision="highest"),
        keep * state.k_sum + k.sum(axis=-1),
    )
    out = numerator / (denominator + eps)[..., None] if normalize else numerator
    return out.astype(v.dtype), state
