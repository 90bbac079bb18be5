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
        expand: x -> φ(x) [F, C].
        pull: (x, gradient of φ(x) [F, C]) -> gradient of x [D, C].
        weigh: q · k -> φ(q) · φ(k), elementwise; None: weights are inner products of features.
        slope: the derivative of `weigh`.
        positions: place in the kernel's features of each public feature, int [public F]; None: their own.
    """

    dim: int
    num_features: int
    expand: Callable
    pull: Callable
    weigh: Callable | None = None
    slope: Callable | None = None
    positions: np.ndarray | None = dataclasses.field(default=None, compare=False)

    def from_public(self, state):
        """[..., public F] -> [..., F]."""
        if self.positions is None:
            return state
        return (
            jnp.zeros((*state.shape[:-1], self.num_features), state.dtype)
            .at[..., self.positions]
            .set(state, unique_indices=True)
        )

    def to_public(self, state):
        """[..., F] -> [..., public F]."""
        return state if self.positions is None else state[..., self.positions]


@functools.cache
def kernel_features(feature_map: FeatureMap, dim: int) -> KernelFeatures:
    """`feature_map` on vectors of `dim` dimensions."""
    if feature_map is FEATURE_MAPS["taylor"]:
        return _taylor(dim)
    expand = _elu_plus_one if feature_map is FEATURE_MAPS["elu+1"] else feature_map.expand
    return KernelFeatures(
        dim=dim,
        num_features=feature_map.num_features(dim),
        expand=expand,
        pull=lambda x, gradient: jax.vjp(expand, x)[1](gradient)[0],
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
        phi[...] = features.expand(x[...])
        d_x[...] = features.pull(x[...], phi[...])

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
    """1, x / d^(1/4) and the unordered pairs x_i x_j / sqrt(d), squares over sqrt(2), as `feature_maps` has them.

    Pairs come by their distance on a ring of the dimensions, so that each group is one rotation of sublanes and one
    product. Dimensions that fill up the ring are zero and so are their pairs.
    """
    size = dim + -dim % TAYLOR_MULTIPLE
    half = size // 2
    pair_scale, square_scale, linear_scale = dim**-0.5, (2 * dim) ** -0.5, dim**-0.25

    def ahead(x, distance):
        """Row i of the result is row i + distance of x, on the ring."""
        return pltpu.roll(x, size - distance, 0)

    def expand(x):
        scaled = x * pair_scale
        groups = [x * (x * square_scale)]
        groups += [scaled * ahead(x, distance) for distance in range(1, half)]
        # At distance d / 2 the second half of the ring repeats the first.
        groups += [scaled[:half] * x[half:], x * linear_scale]
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, x.shape[1]), 0)
        return jnp.concatenate([*groups, (row == 0).astype(x.dtype)], axis=0)

    def pull(x, gradient):
        scaled = x * pair_scale
        opposite = gradient[half * size :][:half]
        d_x = gradient[:size] * (x * (2 * square_scale))
        d_x += gradient[half * size + half :][:size] * linear_scale
        d_x += jnp.concatenate([opposite * scaled[half:], opposite * scaled[:half]], axis=0)
        for distance in range(1, half):
            d_pair = gradient[distance * size :][:size]
            d_x += d_pair * ahead(scaled, distance) + pltpu.roll(d_pair * scaled, distance, 0)
        return d_x

    def weigh(product):
        logit = product * pair_scale
        return 1 + logit * (1 + 0.5 * logit)

    def slope(product):
        return pair_scale + product * (pair_scale * pair_scale)

    return KernelFeatures(
        dim=size,
        num_features=half * size + half + size + SUBLANES,
        expand=expand,
        pull=pull,
        weigh=weigh,
        slope=slope,
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
