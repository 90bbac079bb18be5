"""What the GPU kernels of linear attention share: specification, grid, and of a tile features, weights and masks.

Arrays lie in HBM as [B, T, H, .], with time padded to whole groups of tokens and the last axis to whole rows of shared
memory. States are [B, groups, H, F, E], bfloat16, one for each group: products take them as they lie.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, WARPGROUPS, along
from pallas_kernels.linear_attention.gpu_features import FEATURES, GpuFeatures

# Tokens of a block: rows of the tiles of its warpgroups.
BLOCK = WARPGROUPS * ROWS
# Tokens of a tile that a block visits; as many as features, so that either fits the same shared memory.
COLUMNS = FEATURES
# Axes of the grid.
AXES = ("batch", "head", "block")
# Entries of a row of values: 128 bytes, the widest swizzle of shared memory.
VALUE_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments of the kernels.

    Attributes:
        features: the feature map.
        group: tokens between two states, whole blocks.
        has_initial: a state comes in.
        normalize: as the op has it.
        eps: as the op has it.
        interpret: as `hopper.call` takes it.
    """

    features: GpuFeatures
    group: int
    has_initial: bool
    normalize: bool
    eps: float
    interpret: Any

    def tiles_of_past(self, group):
        """Tiles of features of the state before a group; none where there is no such state."""
        tiles = self.features.tiles
        return tiles if self.has_initial else jnp.where(group > 0, tiles, 0)


class Block(NamedTuple):
    """The tokens that a block of threads writes.

    Attributes:
        batch: index of the row.
        head: index of the head.
        index: index of the block among those of the head.
        group: index of its group.
        first: first tile of tokens of its group.
        own: first of its own tiles of tokens.
        stop: end of the tiles of its group.
    """

    batch: Any
    head: Any
    index: Any
    group: Any
    first: Any
    own: Any
    stop: Any

    @classmethod
    def here(cls, spec: Spec) -> "Block":
        """That of the running kernel."""
        batch, head, index = (jax.lax.axis_index(name) for name in AXES)
        group = jax.lax.div(index, spec.group // BLOCK)
        tiles = spec.group // COLUMNS
        first = group * tiles
        return cls(batch, head, index, group, first, index * (BLOCK // COLUMNS), first + tiles)

    def rows(self, warpgroup):
        """The tokens whose rows a warpgroup has."""
        return pl.ds(self.index * BLOCK + warpgroup * ROWS, ROWS)


def grid(x) -> dict[str, int]:
    """Of [B, T, H, .]. Blocks of the same head run together, and share its states in the cache of the chip."""
    batch, length, heads, _ = x.shape
    return dict(zip(AXES, (batch, heads, length // BLOCK), strict=True))


# Features.


def picked(x, matrices) -> list:
    """x̂ A_i of tokens [T, Dx], for each of the matrices [Dx, F] in shared memory: [T, F] in registers."""
    return hopper.products(*((x, matrix) for matrix in matrices)) if matrices else []


def features_of(x, entries):
    """φ̂(x) [T, F] in registers, of x̂ in shared memory and what matrices have picked of it, if any."""
    if entries:
        return math.prod(entries[1:], start=entries[0])
    return plgpu.load(x, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def add_pulled(spec: Spec, total, entries, d_products, matrices):
    """`total` and the gradient of x̂ [T, Dx] from that of Π_i (x̂ A_i) [T, F].

    A picked entry has the others of its feature as its slope.
    """
    if not matrices:
        return total + d_products
    for i, matrix in enumerate(matrices):
        others = [entry for j, entry in enumerate(entries) if j != i]
        slope = math.prod(others, start=d_products)
        total = hopper.add_product(total, slope, matrix.T, spec.interpret)
    return total


def start_state(
    ring: hopper.Ring, spec: Spec, num_tiles, state, sums, selectors, block: Block
) -> hopper.Tiles:
    """The state that a block meets, through a ring as `state_ring` makes it."""
    at = (block.batch, block.group, block.head)

    def pieces(tile):
        features = pl.ds(tile * spec.features.tile, spec.features.tile)
        yield state.at[*at, features]
        yield sums.at[*at, features]
        for i in range(spec.features.matrices):
            yield selectors.at[i, :, features]

    return ring.start(num_tiles, pieces)


def start_keys(ring: hopper.Ring, block: Block, k, v, rows) -> hopper.Tiles:
    """Keys and values of a block's group up to its own, and where there are `rows`, the keys' runs."""

    def pieces(i):
        columns = pl.ds((block.first + i) * COLUMNS, COLUMNS)
        yield k.at[block.batch, columns, block.head]
        yield v.at[block.batch, columns, block.head]
        if rows is not None:
            yield rows.at[block.batch, AS_KEY, columns]

    return ring.start(block.own + BLOCK // COLUMNS - block.first, pieces)


def state_ring(spec: Spec, values: int) -> hopper.Ring:
    """Scratch for the state that a block meets, by tiles of features: rows of it, of its sums, and the matrices."""
    features = spec.features
    matrix = ((features.width, features.tile), jnp.bfloat16)
    pieces = [((features.tile, values), jnp.bfloat16), ((features.tile,), jnp.float32)]
    pieces += [matrix] * features.matrices
    ring = hopper.ring(*pieces)
    if features.tiles == 1:
        # The only tile, of up to all features, needs no room for the next one.
        ring = ring._replace(
            buffers=tuple(plgpu.SMEM((1, *shape), dtype) for shape, dtype in pieces)
        )
    return ring


def rows_kept(x, kept):
    """A tile whose rows are multiplied with `kept`, a vector of them; None: 1."""
    return x if kept is None else x * along(kept, x.shape, 0)


# Weights.


def weigh(spec: Spec, products):
    """x̂ · ŷ -> the weights, where they are not masked."""
    return products if spec.features.weigh is None else spec.features.weigh(products)


def weigh_gradient(spec: Spec, products, d_weights):
    """The gradient of x̂ · ŷ."""
    return d_weights if spec.features.slope is None else d_weights * spec.features.slope(products)


# Which tokens meet.

# Rows of what is known of each token where there are segments, float32 [B, 4, T]: the number of its run as a query and
# as a key (different for padding), whether it is of the run of the state before its group, and of that after.
AS_QUERY, AS_KEY, FROM_PAST, TO_STATE = range(4)


def token_rows(spec: Spec, runs):
    """int [B, T padded], or None -> (float32 [B, 4, T], keeps float32 [B, groups]), or None.

    `keeps`: 1 where the state before a group and that after it are of one run.
    """
    if runs is None:
        return None, None
    by_group = runs.reshape(runs.shape[0], -1, spec.group)
    after = jnp.maximum(jax.lax.cummax(by_group.max(axis=2), axis=1), 1)
    before = jnp.pad(after[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    keeps = (before == after).astype(jnp.float32)
    before, after = (jnp.repeat(x, spec.group, axis=1) for x in (before, after))
    as_key = jnp.where(runs == 0, -1, runs)
    rows = jnp.stack([runs, as_key, runs == before, runs == after], axis=1)
    return rows.astype(jnp.float32), keeps


def load_token_row(tokens, which: int, block: Block, warpgroup):
    """Of the tokens of a warpgroup, along the rows of its tiles."""
    return hopper.load_vector(tokens.at[block.batch, which, block.rows(warpgroup)], 0)


def where_allowed(x, first_query, first_key, runs, *, queries_axis: int):
    """A tile with 0 where a query does not see a key.

    Args:
        x: the tile, [queries, keys] or [keys, queries].
        first_query: index of the first query of the tile.
        first_key: likewise.
        runs: vectors of the runs of the queries and of the keys; None: all are of one.
        queries_axis: 0 for a tile [queries, keys], 1 for [keys, queries].
    """

    def index(axis):
        return plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=plgpu.Layout.WGMMA)

    def mask(x):
        keys, queries = index(1 - queries_axis) + first_key, index(queries_axis) + first_query
        return jnp.where(keys <= queries, x, 0)

    is_full = first_key + x.shape[1 - queries_axis] <= first_query + 1
    x = jax.lax.cond(is_full, lambda x: x, mask, x)
    if runs is None:
        return x
    of_queries = along(runs[0], x.shape, queries_axis)
    of_keys = along(runs[1], x.shape, 1 - queries_axis)
    return jnp.where(of_queries == of_keys, x, 0)
