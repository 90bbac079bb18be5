"""Rows times their group's matrix, for NVIDIA Hopper: the output of a grouped product, and the gradient of its rows.

A block computes the rows of a tile that belong to one group; where groups meet in a tile, several blocks compute it,
and each writes its own rows (as megablox does; Gale et al., "MegaBlocks", arXiv 2211.15841, section 5). The rows of no
group are one more group, whose products are left out.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.gpu_tile import BLOCK, STAGED, columns, pad, write
from pallas_kernels.hopper import ROWS, WARPGROUPS


def rows_times_matrices(rows, matrices, group_sizes, *, transposed: bool, interpret):
    """[M, K] x [G, K, N] -> [M, N]; with `transposed` the matrices are [G, N, K]. Rows of no group give 0."""
    num_rows, width = rows.shape[0], matrices.shape[1 if transposed else 2]
    rows, matrices = pad(rows), pad(matrices)
    size = matrices.shape[1 if transposed else 2]
    tile = columns(size)
    table = visits(group_sizes, rows.shape[0])
    matrix_tile = (tile, BLOCK) if transposed else (BLOCK, tile)
    (out,) = hopper.call(
        functools.partial(_kernel, tile, transposed),
        (table, rows, matrices),
        out=(((rows.shape[0], size), rows.dtype),),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, STAGED), rows.dtype),
            hopper.ring(((BLOCK, BLOCK), rows.dtype), (matrix_tile, rows.dtype)),
        ),
        # Blocks that run together share a group's matrix.
        grid={"column": size // tile, "visit": table.shape[0]},
        interpret=interpret,
        name="grouped_matmul_rows",
    )
    return out[:num_rows, :width]


def visits(group_sizes, num_rows: int):
    """int32 [visits, 4]: group, tile of rows, and the group's first row and end, of each tile of each group.

    Those of no group are group G. There are no more visits than tiles and groups; what is left of them has no rows.
    """
    rest = num_rows - group_sizes.sum(keepdims=True)
    ends = jnp.cumsum(jnp.concatenate([group_sizes, rest]))
    starts = jnp.concatenate([jnp.zeros_like(rest), ends[:-1]])
    first_tile = starts // BLOCK
    counts = jnp.where(ends > starts, -(-ends // BLOCK) - first_tile, 0)
    until = jnp.cumsum(counts)
    visit = jnp.arange(num_rows // BLOCK + len(group_sizes), dtype=jnp.int32)
    group = jnp.searchsorted(until, visit, side="right")
    is_used = visit < until[-1]
    group = jnp.minimum(group, len(group_sizes))
    tile = jnp.where(is_used, visit - (until - counts)[group] + first_tile[group], 0)
    bounds = [jnp.where(is_used, x[group], 0) for x in (starts, ends)]
    return jnp.stack([group, tile, *bounds], axis=1).astype(jnp.int32)


def _kernel(width: int, transposed: bool, table, rows, matrices, out, staged, ring):
    """A block: rows [BLOCK, K] and columns [K, width] of a group's matrix -> the group's rows of out [BLOCK, width]."""
    visit = jax.lax.axis_index("visit")
    group, tile, start, end = (table[visit, i] for i in range(4))
    columns_of_block = pl.ds(jax.lax.axis_index("column") * width, width)
    is_group = (group < matrices.shape[0]) & (end > start)
    num_tiles = jnp.where(is_group, rows.shape[1] // BLOCK, 0)
    warpgroup = jax.lax.axis_index("warpgroup")

    def pieces(i):
        inner = pl.ds(i * BLOCK, BLOCK)
        yield rows.at[pl.ds(tile * BLOCK, BLOCK), inner]
        place = (columns_of_block, inner) if transposed else (inner, columns_of_block)
        yield matrices.at[(group, *place)]

    tiles = ring.start(num_tiles, pieces)

    def multiply(sums):
        def step(i, pieces, carry):
            row_tile, matrix_tile = pieces
            own_rows = row_tile.at[pl.ds(warpgroup * ROWS, ROWS)]
            plgpu.wgmma(sums, own_rows, matrix_tile.T if transposed else matrix_tile)
            plgpu.wgmma_wait(0)
            return carry

        tiles.fold(step, jnp.int32(0))
        return sums[...]

    sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, width), jnp.float32))
    first_row = tile * BLOCK + warpgroup * ROWS
    first = jnp.clip(start - first_row, 0, ROWS)
    count = jnp.clip(end - first_row, 0, ROWS) - first
    target = out.at[pl.ds(first_row, ROWS), columns_of_block]
    write(sums, staged.at[warpgroup], target, first, count)
