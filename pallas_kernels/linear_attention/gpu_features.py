"""Feature maps as the GPU kernels compute them: each feature is a product of entries of a vector.

A kernel gets x̂, a vector that XLA makes on the way to whole rows of shared memory, and matrices A_i of zeros and ones
that pick entries of it: φ(x)_f = s_f Π_i (x̂ A_i)_f. Picking by a matrix product is exact, takes the tensor cores, which
have the time, and leaves the features in the registers where products of tiles are.

- The Taylor map: x̂ = (x, 1). Its features are the products of unordered pairs of entries of x̂, those with the 1 being
  the constant and linear ones, so that two matrices pick them in any order: here the public one.
- Every other map: x̂ = φ(x), as wide as the state. One matrix picks the columns of a tile where states are made; a block
  that meets a state takes x̂ as it is.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import ROWS, WARPGROUPS
from pallas_kernels.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap

# Widths of x̂ in shared memory: its rows have a power of two of bytes, or are two of 128. Two matrices for a tile of
# features fit beside x̂ up to the widest of the Taylor map.
TAYLOR_WIDTHS = (32, 64)
OTHER_WIDTHS = (64, 128)
# Features of a tile: one warpgroup makes the states of its rows.
FEATURES = ROWS


@dataclasses.dataclass(frozen=True)
class GpuFeatures:
    """A feature map on vectors of D dimensions.

    Attributes:
        num_features: F, the public ones.
        width: Dx, the entries of x̂ that a kernel is given; zeros fill them up.
        prepare: [B, T, H, D] -> x̂ without the zeros, in float32.
        selectors: A_i, bfloat16 [1 or 2, Dx, padded F].
        scales: s_f, float32 [F].
        tile: features on which a block meets a state at once.
        weigh: x̂ · ŷ -> φ(x) · φ(y), elementwise; None: they are the same.
        slope: the derivative of `weigh`; None: 1.
    """

    num_features: int
    width: int
    prepare: Callable
    selectors: np.ndarray = dataclasses.field(compare=False)
    scales: np.ndarray = dataclasses.field(compare=False)
    tile: int = FEATURES
    weigh: Callable | None = None
    slope: Callable | None = None

    @property
    def tiles(self) -> int:
        """Tiles that hold all features."""
        return -(-self.num_features // self.tile)

    @property
    def matrices(self) -> int:
        """Matrices with which a block that meets a state picks entries; 0: it takes x̂ as it is."""
        degree = self.selectors.shape[0]
        return degree if degree > 1 else 0

    @property
    def padded(self) -> int:
        """F of the kernels: whole tiles for all warpgroups. The features past `num_features` are 0."""
        return self.selectors.shape[2]

    @property
    def squared_scales(self) -> np.ndarray:
        """Of each feature of the kernels, what its products of entries count in φ(x) · φ(y); float32 [padded F]."""
        return np.pad(np.square(self.scales), (0, self.padded - self.num_features))


def refuses(feature_map: FeatureMap, dim: int) -> str | None:
    """Why there are no `gpu_features` for this map."""
    if feature_map is FEATURE_MAPS["taylor"]:
        largest = TAYLOR_WIDTHS[-1] - 1
        return f"head_dim {dim}; the Taylor map takes up to {largest}" if dim > largest else None
    features = feature_map.num_features(dim)
    if features > OTHER_WIDTHS[-1]:
        return f"{features} features; a map other than Taylor's takes up to {OTHER_WIDTHS[-1]}"
    return None


@functools.cache
def gpu_features(feature_map: FeatureMap, dim: int) -> GpuFeatures:
    """`feature_map` on vectors of `dim` dimensions."""
    if feature_map is FEATURE_MAPS["taylor"]:
        return _taylor(dim)
    features = feature_map.num_features(dim)
    width = _width(features, OTHER_WIDTHS)

    def prepare(x):
        expanded = feature_map.expand(x.astype(jnp.float32).swapaxes(-1, -2))
        return expanded.swapaxes(-1, -2)

    return GpuFeatures(
        num_features=features,
        width=width,
        prepare=prepare,
        selectors=_selectors([np.arange(features)], width),
        scales=np.ones(features, np.float32),
        tile=width,
    )


def _taylor(dim: int) -> GpuFeatures:
    """1, x / d^(1/4) and the unordered pairs x_i x_j / sqrt(d), squares over sqrt(2), as `feature_maps` has them."""
    index = np.arange(dim)
    # Entry `dim` of x̂ is 1.
    first, second = [np.full(1, dim), index, index], [np.full(1 + dim, dim), index]
    scales = [np.ones(1), np.full(dim, dim**-0.25), np.full(dim, (2 * dim) ** -0.5)]
    for distance in range(1, dim // 2 + 1):
        count = dim // 2 if 2 * distance == dim else dim
        first.append(index[:count])
        second.append((index[:count] + distance) % dim)
        scales.append(np.full(count, dim**-0.5))
    pairs = [np.concatenate(x) for x in (first, second)]

    def prepare(x):
        x = x.astype(jnp.float32)
        return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)

    # 1 + l + l²/2 of the logit l = (x̂ · ŷ - 1) / sqrt(d), which x̂ · ŷ exceeds by the product of the two ones, as a
    # polynomial of x̂ · ŷ: two instructions and not four.
    scale = dim**-0.5
    constant, linear, square = 1 - scale + scale**2 / 2, scale - scale**2, scale**2 / 2

    def weigh(product):
        return (square * product + linear) * product + constant

    def slope(product):
        return 2 * square * product + linear

    width = _width(dim + 1, TAYLOR_WIDTHS)
    return GpuFeatures(
        num_features=len(pairs[0]),
        width=width,
        prepare=prepare,
        selectors=_selectors(pairs, width),
        scales=np.concatenate(scales).astype(np.float32),
        weigh=weigh,
        slope=slope,
    )


def _width(entries: int, widths) -> int:
    return next(width for width in widths if width >= entries)


def _selectors(picked, width: int) -> np.ndarray:
    """Entries that each matrix picks, int [F] each -> the matrices."""
    count = len(picked[0])
    matrices = np.zeros((len(picked), width, count + -count % (WARPGROUPS * FEATURES)))
    for matrix, entries in zip(matrices, picked, strict=True):
        matrix[entries, np.arange(count)] = 1
    return matrices.astype(jnp.bfloat16)
