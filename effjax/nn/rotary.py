"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), and how it is stretched to longer texts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.nn.shards import on_shards
from effjax.unknown import unknown
from pallas_kernels.dispatch import target

SCALINGS = ("linear", "llama3")
# Of a TPU's vector unit.
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How rotary frequencies are slowed down, so that more positions fit into the angles seen in training.

    - "linear": all of them by `factor`, position interpolation (Chen et al., 2023, arXiv 2306.15595, eq. 4).
    - "llama3": by `factor` those that turn fewer than `low_freq_factor` times in `original_length` tokens, not at all
      those that turn more than `high_freq_factor` times, and something between the two in between, linear in the turns
      (Llama 3.1; the idea is the "by parts" of YaRN, arXiv 2309.00071, section 3.2).

    Attributes:
      kind: one of `SCALINGS`.
      factor: of the slowest frequencies.
      low_freq_factor: turns, for "llama3".
      high_freq_factor: turns, for "llama3".
      original_length: tokens of a training sequence, for "llama3".

    Raises:
      ValueError: for an unknown kind, or numbers that make no sense.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in SCALINGS:
            raise ValueError(unknown("rope_scaling", self.kind, SCALINGS))
        if not self.factor > 0:
            raise ValueError(f"rope_factor={self.factor}; valid: greater than 0")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_low_freq_factor={self.low_freq_factor}, "
                f"rope_high_freq_factor={self.high_freq_factor}; valid: 0 < low < high"
            )
        if self.original_length < 1:
            raise ValueError(f"rope_original_length={self.original_length}; valid: at least 1")

    def __call__(self, frequencies: Float[Array, " F"]) -> Float[Array, " F"]:
        """The slower frequencies, in radians a token as those given."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_length * frequencies / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        kept = jnp.clip((turns - self.low_freq_factor) / width, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


def rotary(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    base: float = 10_000.0,
    scaling: Scaling | None = None,
) -> Float[Array, "B T H D"]:
    """Rotates the pairs (x[i], x[i + D/2]) of every head by position * base^(-2i/D), slowed by `scaling`.

    The halves layout is that of Llama checkpoints. The angles are float32 whatever the dtype of x.

    Raises:
      ValueError: if the head dimension is odd.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary needs an even head_dim, got {dim}")
    frequencies = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    if target().platform == "tpu" and dim % (2 * _LANES):
        heads = "batch length heads _"
        return on_shards(_by_products, (heads, heads), heads)(x, angles)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _by_products(x, angles, axis_name=None):
    """x [B, T, H, D] turned by angles [B, T, 1, D/2], for vector units of which half a head would leave lanes idle.

    Heads stand side by side until they fill the lanes. Tokens have nothing to do with each other, so that it does not
    matter over which axis they are split.
    """
    del axis_name
    *tokens, heads, dim = x.shape
    abreast = math.gcd(heads, max(1, _LANES // dim))
    # Here and not in `_turned`, where XLA would not take them out of a scan over layers.
    cos, sin = (jnp.tile(f(angles), 2 * abreast) for f in (jnp.cos, jnp.sin))
    x = x.reshape(*tokens, heads // abreast, abreast * dim)
    return _turned(dim, x, cos, sin).reshape(*tokens, heads, dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned(dim, x, cos, sin):
    """x [B, T, N, heads abreast * dim] turned by angles of these cosines and sines [B, T, 1, heads abreast * dim].

    The halves of a head change places, (-second, first), in the matrix unit. That is exact: each column of the matrix
    has one entry, 1 or -1. The tables have no gradient.
    """
    swap = np.kron(np.eye(x.shape[-1] // dim), np.kron([[0, 1], [-1, 0]], np.eye(dim // 2)))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    swapped = jnp.dot(x, jnp.asarray(swap, x.dtype), precision=precision)
    return (x * cos + swapped * sin).astype(x.dtype)


def _turned_forward(dim, x, cos, sin):
    return _turned(dim, x, cos, sin), (cos, sin)


def _turned_backward(dim, tables, cotangent):
    # The transpose of a rotation turns back. Left to itself it would be in float32, and read and write twice as much.
    cos, sin = tables
    return _turned(dim, cotangent, cos, -sin), None, None


_turned.defvjp(_turned_forward, _turned_backward)
