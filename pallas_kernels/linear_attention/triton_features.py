"""Feature maps as the Triton kernels compute them: a block of features of a block of tokens at a time.

The Taylor map's features are 1, x / d^(1/4) and the pairs x_i x_j / sqrt(d) (squares over sqrt(2)) by their distance
j - i on a ring of the dimensions, as `feature_maps` has them. Each of these groups takes `width` columns here, so that
groups fill tiles; rows of states in HBM are the public features. Both factors of a pair are read where they lie, so
that the features of a token exist in registers only.
"""

import dataclasses

import triton
import triton.language as tl

from pallas_kernels.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap
from pallas_kernels.linear_attention.triton_blocks import Blocks
from pallas_kernels.triton_tiles import Heads
from pallas_kernels.triton_tiles import exact_dot as dot

# Features of a tile of the Taylor map, where a group is not wider.
FEATURES = 32
# Groups of the Taylor map, in order: 1; x; pairs at distance 0, 1, ... d / 2.
ONE, LINEAR, SQUARES = (tl.constexpr(group) for group in range(3))


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static arguments of a kernel.

    Attributes:
        q: sizes of queries and keys.
        v: sizes of values.
        feature_map: its name.
        chunk: tokens a chunk, whole tiles.
        blocks: lengths of the tiles.
        has_initial: whether a state comes in.
        normalize: divide by the sum of the weights.
        eps: added to the sum of the weights.
    """

    q: Heads
    v: Heads
    feature_map: str
    chunk: int
    blocks: Blocks
    has_initial: bool
    normalize: bool
    eps: float

    @property
    def num_features(self) -> int:
        """F of the public state."""
        return FEATURE_MAPS[self.feature_map].num_features(self.q.dim)

    @property
    def is_taylor(self) -> bool:
        return self.feature_map == "taylor"

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.blocks.tokens

    @property
    def num_blocks(self) -> int:
        """Tiles of tokens."""
        return -(-self.q.length // self.tokens)

    @property
    def blocks_of_chunk(self) -> int:
        return self.chunk // self.tokens

    @property
    def num_chunks(self) -> int:
        return -(-self.q.length // self.chunk)

    @property
    def features(self) -> int:
        """Features of a tile."""
        return max(FEATURES, self.q.width) if self.is_taylor else self.q.width

    @property
    def num_feature_blocks(self) -> int:
        groups = SQUARES.value + self.q.dim // 2 + 1 if self.is_taylor else 1
        return -(-groups * self.q.width // self.features)

    @property
    def values(self) -> int:
        """Values of a tile of a state that is summed up."""
        return min(64, self.v.width)

    @property
    def num_value_blocks(self) -> int:
        return self.v.width // self.values

    @property
    def scales(self) -> tuple[float, float, float]:
        """Factors of x, of the squares and of the other pairs."""
        dim = self.q.dim
        return dim**-0.25, (2 * dim) ** -0.5, dim**-0.5


def name_of(feature_map: FeatureMap) -> str | None:
    """The name of a map of `FEATURE_MAPS`, or None."""
    return next((name for name, known in FEATURE_MAPS.items() if known is feature_map), None)


# Columns of a block of features.


@triton.jit
def feature_rows(s: tl.constexpr, block):
    """The public feature of each column of a block, and which columns hold one."""
    column = block * s.features + tl.arange(0, s.features)
    if s.is_taylor:
        group, i = column // s.q.width, column % s.q.width
        row = tl.where(group == ONE, 0, 1 + (group - LINEAR) * s.q.dim + i)
        # At distance d / 2 the second half of the ring would repeat the first: those are past the last feature.
        holds_x = (group > ONE) & (i < s.q.dim) & (row < s.num_features)
        exists = holds_x | ((group == ONE) & (i == 0))
    else:
        row, exists = column, column < s.q.dim
    return row, exists


@triton.jit
def _taylor_factors(s: tl.constexpr, x, batch, head, start, block):
    """Of each feature x_i x_j scale: x_i and x_j [tokens, features], i and j or -1 where that factor is 1, scale."""
    column = block * s.features + tl.arange(0, s.features)
    _, exists = feature_rows(s, block)
    group, i = column // s.q.width, column % s.q.width
    scale = tl.where(group == SQUARES, s.scales[1], s.scales[2])
    scale = tl.where(group == LINEAR, s.scales[0], tl.where(group == ONE, 1.0, scale))
    j = tl.where(exists & (group >= SQUARES), (i + group - SQUARES) % s.q.dim, -1)
    i = tl.where(exists & (group >= LINEAR), i, -1)
    token = tl.arange(0, s.tokens)[:, None]
    first = x + ((batch.to(tl.int64) * s.q.length + start) * s.q.heads + head) * s.q.dim
    pointers = first + token * (s.q.heads * s.q.dim)
    is_token = token < s.q.length - start
    x_i = tl.load(pointers + i[None, :], mask=is_token & (i >= 0)[None, :], other=1.0)
    x_j = tl.load(pointers + j[None, :], mask=is_token & (j >= 0)[None, :], other=1.0)
    return x_i.to(tl.float32), x_j.to(tl.float32), i, j, tl.where(exists, scale, 0.0)


@triton.jit
def expand(s: tl.constexpr, x, tile, batch, head, start, block, keep):
    """φ of the tokens of a tile, 0 where one is not kept: float32 [tokens, features].

    Args:
        s: static arguments.
        x: [B, T, H, D].
        tile: the tokens of x, [tokens, width].
        batch: row of x; so are head and start of the tile.
        block: index of the features.
        keep: bool [tokens].
    """
    if s.is_taylor:
        x_i, x_j, _, _, scale = _taylor_factors(s, x, batch, head, start, block)
        features = x_i * x_j * scale[None, :]
    else:
        features = activation(s, tile)
    return tl.where(keep[:, None], features, 0.0)


@triton.jit
def pull(s: tl.constexpr, x, tile, batch, head, start, block, gradient):
    """The gradient of x [tokens, width] from that of a block of its features; arguments as `expand` has them."""
    if s.is_taylor:
        x_i, x_j, i, j, scale = _taylor_factors(s, x, batch, head, start, block)
        gradient *= scale[None, :]
        # Columns of the same dimension are added up by a product with zeros and ones.
        dimension = tl.arange(0, s.q.width)[None, :]
        d_x = dot((gradient * x_j).to(tile.dtype), (i[:, None] == dimension).to(tile.dtype))
        d_x = dot((gradient * x_i).to(tile.dtype), (j[:, None] == dimension).to(tile.dtype), d_x)
    else:
        d_x = gradient * activation_slope(s, tile)
    return d_x


# Maps of each entry by itself.


@triton.jit
def activation(s: tl.constexpr, tile):
    """identity, elu + 1 or softplus of a tile in float32; 0 beyond the head dim."""
    x = tile.to(tl.float32)
    if s.feature_map == "elu+1":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    if s.feature_map == "softplus":
        small = tl.exp(-tl.abs(x))
        # log(1 + small) without what the sum cancels: Kahan's correction by the sum as it was rounded.
        rounded = 1 + small
        log1p = tl.where(rounded == 1, small, tl.log(rounded) * small / (rounded - 1))
        x = tl.maximum(x, 0.0) + log1p
    return tl.where(tl.arange(0, s.q.width)[None, :] < s.q.dim, x, 0.0)


@triton.jit
def activation_slope(s: tl.constexpr, tile):
    """The derivative of `activation`."""
    x = tile.to(tl.float32)
    slope = tl.full(x.shape, 1, tl.float32)
    if s.feature_map == "elu+1":
        slope = tl.exp(tl.minimum(x, 0.0))
    if s.feature_map == "softplus":
        slope = 1 / (1 + tl.exp(-x))
    return slope


# Weights φ(q) · φ(k) inside of a chunk, from products of what `operand` returns.


@triton.jit
def operand(s: tl.constexpr, tile):
    """What the weights are made of: tokens themselves for the Taylor map, else their features."""
    return tile if s.is_taylor else activation(s, tile).to(tile.dtype)


@triton.jit
def weigh(s: tl.constexpr, products):
    """1 + x + x² / 2 with x = q · k / sqrt(d), or the product itself."""
    if s.is_taylor:
        logits = products * s.scales[2]
        products = 1 + logits * (1 + 0.5 * logits)
    return products


@triton.jit
def weigh_slope(s: tl.constexpr, products, gradient):
    """The gradient of the products from that of the weights."""
    if s.is_taylor:
        scale = s.scales[2]
        gradient *= scale + products * (scale * scale)
    return gradient
