"""The recurrent state of linear attention and its one-token step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import feature_maps


class LinearAttentionState(NamedTuple):
    """What a sequence leaves behind: constant in its length.

    Attributes:
        kv: float [B, H, F, Dv], the sum over tokens of φ(k) vᵀ.
        k_sum: float [B, H, F], the sum over tokens of φ(k).
    """

    kv: jax.Array
    k_sum: jax.Array

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        dim: int,
        value_dim: int,
        feature_map="taylor",
        dtype=jnp.float32,
    ) -> "LinearAttentionState":
        """The state before the first token."""
        features = feature_maps.get(feature_map).num_features(dim)
        return cls(
            jnp.zeros((batch, heads, features, value_dim), dtype),
            jnp.zeros((batch, heads, features), dtype),
        )


def step(state: LinearAttentionState, q, k, v, *, feature_map, normalize: bool, eps: float):
    """One token, q and k [B, H, D], v [B, H, Dv]: returns `(out [B, H, Dv], state)`."""
    dtype = state.kv.dtype
    q, k = (feature_map.expand(x.astype(dtype)[..., None])[..., 0] for x in (q, k))
    kv = state.kv + k[..., None] * v.astype(dtype)[..., None, :]
    k_sum = state.k_sum + k
    out = jnp.einsum("bhf,bhfe->bhe", q, kv)
    if normalize:
        out /= jnp.sum(q * k_sum, axis=-1, keepdims=True) + eps
    return out.astype(v.dtype), LinearAttentionState(kv, k_sum)
