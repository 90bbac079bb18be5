"""The walk of the TPU kernels over tiles of rows: a tile is visited once for each group that has rows in it."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import round_up
from pallas_kernels.chips import matrix_width
from pallas_kernels.dispatch import target

LANES = 128
# Rows of a bfloat16 register.
SUBLANES = 16
# A block of a matrix: while a tile of rows is multiplied by one, the next is on its way.
MATRIX_BYTES, COLUMNS = 8 * 2**20, 4096
# The longest sum of products that a block has whole, in bfloat16; a longer one is cut into parts of half of it.
DEPTH = 4096
# Rows of a tile whose sums come in parts: each part of a matrix is read anew for it.
ROWS_OF_PARTS = 512
# Two blocks of a matrix, one of which is on its way, are 16 MiB.
VMEM_LIMIT = 40 * 2**20


class Visits(NamedTuple):
    """In scalar memory. Visits past the last one are of a group behind all others, and of the last tile once more.

    Attributes:
        group: int32 [visits].
        tile: int32 [visits].
        bounds: int32 [groups + 1], the first row of each group, and the one after its last is the next group's first.
    """

    group: jax.Array
    tile: jax.Array
    bounds: jax.Array

    def rows(self, visit, tile_rows: int):
        """First row of the visit's group and the one after its last, counted from the first of the tile."""
        group, first = self.group[visit], self.tile[visit] * tile_rows
        return self.bounds[group] - first, self.bounds[group + 1] - first


def visits(group_sizes, num_rows: int, tile_rows: int, *, every_group: bool) -> Visits:
    """The visits in the order of rows.

    Args:
        group_sizes: int32 [G].
        num_rows: M, a multiple of `tile_rows`.
        tile_rows: rows of a tile.
        every_group: groups without rows are visited too, once. Otherwise the rows past the last group's are group G.
    """
    groups, tiles = group_sizes.shape[0] + (not every_group), num_rows // tile_rows
    # Behind the last bound of the G groups all are M.
    sizes = jnp.pad(group_sizes, (1, groups - group_sizes.shape[0] + 1), constant_values=num_rows)
    bounds = jnp.minimum(jnp.cumsum(sizes) - num_rows, num_rows)
    starts, ends = bounds[:groups], bounds[1 : groups + 1]
    # Truncated: nothing that counts is negative.
    tile_of = functools.partial(jax.lax.div, y=jnp.int32(tile_rows))
    first = jnp.minimum(tile_of(starts), tiles - 1)
    counts = jnp.where(ends > starts, tile_of(ends - 1) - first + 1, int(every_group))
    upto = jnp.cumsum(counts)
    # Each group begins at most one more visit than there are tiles.
    number = jnp.arange(tiles + group_sizes.shape[0], dtype=jnp.int32)
    is_over = number[:, None] >= upto
    group = jnp.sum(is_over, axis=1, dtype=jnp.int32)
    # Summed over the groups before, as to gather the offset of each visit's group takes longer.
    offset = first - (upto - counts)
    steps = jnp.where(is_over[:, :-1], jnp.diff(offset), 0)
    tile = number + offset[0] + jnp.sum(steps, axis=1, dtype=jnp.int32)
    last_tile = jnp.maximum(tile_of(ends[-1] - 1), 0)
    tile = jnp.minimum(tile, last_tile if every_group else tiles - 1)
    return Visits(group, tile, bounds)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of blocks.

    Attributes:
        rows: of a tile.
        columns: of the result.
        depth: products that are summed at a time.
    """

    rows: int
    columns: int
    depth: int


def sizes(num_rows: int, depth: int, columns: int, itemsize: int) -> Sizes:
    """Of [num_rows, depth] x [depth, columns]. A tile has the rows of a matrix unit, as boundaries of groups cut it."""
    most = DEPTH * 2 // itemsize
    if depth <= most:
        rows = unit_rows()
    else:
        parts = -(-depth // (most // 2))
        depth, rows = round_up(-(-depth // parts), LANES), ROWS_OF_PARTS
    most_columns = min(MATRIX_BYTES // (depth * itemsize) // LANES * LANES, COLUMNS)
    return Sizes(min(rows, round_up(num_rows, SUBLANES)), min(columns, most_columns), depth)


def unit_rows() -> int:
    """Rows of a tile: as wide as a matrix unit is."""
    return matrix_width(target().device_kind)


def inside(begin, end, shape):
    """Bool: whether the row is one from `begin` to the one before `end`."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= begin) & (row < end)


def compiler_params() -> pltpu.CompilerParams:
    """Of both kernels, whose grids have a last axis or two along which sums are made."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )
