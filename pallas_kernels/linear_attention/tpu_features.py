"""Feature maps as the TPU kernels compute them: features on sublanes, tokens on lanes.

The kernels want features in whole registers of 8 sublanes. The Taylor map therefore has a layout of its own here, to
and from which states are carried outside of the kernels; every other map is traced into the kernel as it is.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap
from pallas_kernels.linear_attention.tpu_blocks import LANES

SUBLANES = 8
# Half of this, the largest distance between the two of a pair on the ring of dimensions, must fill sublanes.
TAYLOR_MULTIPLE = 2 * SUBLANES


@dataclasses.dataclass(frozen=True)
class KernelFeatures:
    """A feature map for tokens x, float32 [D, C].

    Attributes:
        dim: D, the dimensions that the kernel is given: zeros fill up those of q and k.
        num_features: F.
        expand: (x, ref of scratch float32 [C / 128, scratch_rows, 128]) -> φ(x) [F, C].
        pull: (x, gradient of φ(x) [F, C], the ref that x was expanded with) -> gradient of x [D, C].
        weigh: q · k + offset -> φ(q) · φ(k), elementwise; None: weights are inner products of features.
        slope: the derivative of `weigh` over `slope_scale`.
        slope_scale: a number.
        offset: what is wanted on top of q · k; the matrix unit adds it.
        scratch_rows: of `expand`.
        scale: φ(q) · φ(k) here over that of the public map.
        positions: place in the kernel's features of each public feature, int [public F]; None: their own.
    """

    dim: int
    num_features: int
    expand: Callable
    pull: Callable
    weigh: Callable | None = None
    slope: Callable | None = None
    slope_scale: float = 1.0
    offset: float = 0.0
    scratch_rows: int = 0
    scale: float = 1.0
    positions: np.ndarray | None = dataclasses.field(default=None, compare=False)

    def from_public(self, state):
        """[..., public F] -> [..., F]."""
        if self.positions is None:
            return state
        return (
            jnp.zeros((*state.shape[:-1], self.num_features), state.dtype)
            .at[..., self.positions]
            .set(state * self.scale**0.5, unique_indices=True)
        )

    def to_public(self, state):
        """[..., F] -> [..., public F]."""
        return state if self.positions is None else state[..., self.positions] / self.scale**0.5


@functools.cache
def kernel_features(feature_map: FeatureMap, dim: int) -> KernelFeatures:
    """`feature_map` on vectors of `dim` dimensions."""
    if feature_map is FEATURE_MAPS["taylor"]:
        return _taylor(dim)
    expand = _elu_plus_one if feature_map is FEATURE_MAPS["elu+1"] else feature_map.expand
    return KernelFeatures(
        dim=dim,
        num_features=feature_map.num_features(dim),
        expand=lambda x, ring: expand(x),
        pull=lambda x, gradient, ring: jax.vjp(expand, x)[1](gradient)[0],
    )


def _elu_plus_one(x):
    """Without expm1, which kernels lack."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


@functools.cache
def cannot_trace(feature_map: FeatureMap, dim: int) -> str | None:
    """Why the map's `expand` cannot be part of a kernel: it closes over an array, or does what kernels lack."""
    if feature_map in FEATURE_MAPS.values():
        return None
    features = kernel_features(feature_map, dim)

    def kernel(x, phi, d_x):
        phi[...] = features.expand(x[...], None)
        d_x[...] = features.pull(x[...], phi[...], None)

    tokens = jax.ShapeDtypeStruct((dim, LANES), jnp.float32)
    expanded = jax.ShapeDtypeStruct((features.num_features, LANES), jnp.float32)
    try:
        # The first part of the TPU compiler is in jax, so that this needs neither TPU nor libtpu.
        call = jax.jit(pl.pallas_call(kernel, out_shape=(expanded, tokens)))
        call.trace(tokens).lower(lowering_platforms=("tpu",))
    except Exception as error:  # whatever the function of the user raises, or the compiler
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _taylor(dim: int) -> KernelFeatures:
    """1, x / d^(1/4) and the unordered pairs x_i x_j / sqrt(d), squares over sqrt(2), each times sqrt(2 d).

    So φ(q) · φ(k) = 2 d (1 + l + l²/2) with l = q · k / sqrt(d), which is (q · k + sqrt(d))² + d: fewer operations a
    pair of tokens, and squares are as the matrix unit takes them. Pairs come by their distance on a ring of the
    dimensions, so that each group is one rotation of sublanes and one product. With the ring written twice below each
    other a rotation is a load. Dimensions that fill up the ring are zero and so are their pairs.
    """
    size = dim + -dim % TAYLOR_MULTIPLE
    half = size // 2
    pair_scale, linear_scale, constant = 2**0.5, (4 * dim) ** 0.25, (2 * dim) ** 0.5

    def ahead(ring, distance):
        """Row i of the result is row i + distance of what `expand` put into the ring."""
        rows = slice(distance, distance + size)
        return jnp.concatenate([ring[i, rows] for i in range(ring.shape[0])], axis=1)

    def expand(x, ring):
        for i, first in enumerate(range(0, x.shape[1], LANES)):
            for copy in range(2):
                ring[i, copy * size : (copy + 1) * size] = x[:, first : first + LANES]
        scaled = x * pair_scale
        groups = [x * x, *(scaled * ahead(ring, distance) for distance in range(1, half))]
        # At distance d / 2 the second half of the ring repeats the first.
        groups += [scaled[:half] * x[half:], x * linear_scale]
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, x.shape[1]), 0)
        return jnp.concatenate([*groups, jnp.where(row == 0, constant, 0.0)], axis=0)

    def pull(x, gradient, ring):
        opposite = gradient[half * size :][:half]
        d_pairs = gradient[:size] * (2 / pair_scale * x)
        d_pairs += jnp.concatenate([opposite * x[half:], opposite * x[:half]], axis=0)
        for distance in range(1, half):
            d_pair = gradient[distance * size :][:size]
            d_pairs += d_pair * ahead(ring, distance) + pltpu.roll(d_pair * x, distance, 0)
        return d_pairs * pair_scale + gradient[half * size + half :][:size] * linear_scale

    return KernelFeatures(
        dim=size,
        num_features=half * size + half + size + SUBLANES,
        expand=expand,
        pull=pull,
        weigh=lambda shifted: shifted * shifted + dim,
        slope=lambda shifted: shifted,
        slope_scale=2.0,
        offset=dim**0.5,
        scratch_rows=2 * size,
        scale=2.0 * dim,
        positions=_taylor_positions(dim, size),
    )


def _taylor_positions(dim: int, size: int) -> np.ndarray:
    """Where the kernel, whose ring has `size` dimensions, has each feature of a ring of `dim`."""
    half = size // 2
    linear = half * size + half
    positions = [linear + size, *range(linear, linear + dim), *range(dim)]
    for distance in range(1, dim // 2 + 1):
        for i in range(dim // 2 if 2 * distance == dim else dim):
            j = (i + distance) % dim
            gap = (j - i) % size
            # The pair is counted from the one of the two that has the other within half a ring ahead.
            first, gap = (i, gap) if gap < half or (gap == half and i < half) else (j, size - gap)
            positions.append(gap * size + first)
    return np.array(positions, np.int32)
