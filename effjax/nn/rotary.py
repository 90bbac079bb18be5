"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"], base: float = 10_000.0
) -> Float[Array, "B T H D"]:
    """Rotates the pairs (x[i], x[i + D/2]) of every head by position * base^(-2i/D).

    The halves layout is that of Llama checkpoints. The angles are float32 whatever the dtype of x.

    Raises:
      ValueError: if the head dimension is odd.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary needs an even head_dim, got {dim}")
    frequencies = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
