"""For each group the product lhsᵀ rhs over its rows, for NVIDIA Hopper: the gradient of the matrices.

A block computes a tile of one group's matrix and walks the tiles of rows of the group. Where a tile has rows of other
groups too, or of none, these become 0 in shared memory, in both factors: whatever they hold is no part of the sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.gpu_tile import BLOCK, STAGED, columns, pad, write
from pallas_kernels.hopper import ROWS, WARPGROUPS

# Columns that are cleared at a time: the sums leave no registers for more.
CLEARED = 64


def rows_times_rows(lhs, rhs, group_sizes, *, interpret):
    """[M, K] x [M, N] -> [G, K, N], in lhs's dtype; 0 for a group without rows."""
    shape = (group_sizes.shape[0], lhs.shape[1], rhs.shape[1])
    lhs, rhs = pad(lhs), pad(rhs)
    tile = columns(rhs.shape[1])
    ends = jnp.cumsum(group_sizes)
    (out,) = hopper.call(
        functools.partial(_kernel, tile),
        (jnp.stack([ends - group_sizes, ends], axis=1).astype(jnp.int32), lhs, rhs),
        out=(((shape[0], lhs.shape[1], rhs.shape[1]), lhs.dtype),),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, STAGED), lhs.dtype),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            hopper.ring(((BLOCK, BLOCK), lhs.dtype), ((BLOCK, tile), rhs.dtype)),
        ),
        # Blocks that run together share a group's rows.
        grid={
            "group": shape[0],
            "row": lhs.shape[1] // BLOCK,
            "column": rhs.shape[1] // tile,
        },
        interpret=interpret,
        name="grouped_matmul_matrices",
    )
    return out[:, : shape[1], : shape[2]]


def _kernel(width: int, bounds, lhs, rhs, out, staged, cleaned, ring):
    """A block: lhs [rows, BLOCK] and rhs [rows, width] of a group -> out [BLOCK, width] of its matrix."""
    group, row, column = (jax.lax.axis_index(name) for name in ("group", "row", "column"))
    start, end = (bounds[group, i] for i in range(2))
    first_tile = jax.lax.div(start, BLOCK)
    num_tiles = jnp.where(end > start, jax.lax.div(end + (BLOCK - 1), BLOCK) - first_tile, 0)
    warpgroup = jax.lax.axis_index("warpgroup")

    def pieces(i):
        rows = pl.ds((first_tile + i) * BLOCK, BLOCK)
        yield lhs.at[rows, pl.ds(row * BLOCK, BLOCK)]
        yield rhs.at[rows, pl.ds(column * width, width)]

    tiles = ring.start(num_tiles, pieces)

    own = pl.ds(warpgroup * ROWS, ROWS)

    def multiply(sums):
        def step(i, pieces, carry):
            lhs_tile, rhs_tile = pieces
            first = (first_tile + i) * BLOCK

            @pl.when((first < start) | (first + BLOCK > end))
            def _():
                for piece in pieces:
                    _clear(piece.at[own], first + warpgroup * ROWS, start, end)
                plgpu.barrier_arrive(cleaned)
                plgpu.barrier_wait(cleaned)

            plgpu.wgmma(sums, lhs_tile.at[:, own].T, rhs_tile)
            plgpu.wgmma_wait(0)
            return carry

        tiles.fold(step, jnp.int32(0))
        return sums[...]

    sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, width), jnp.float32))
    rows = pl.ds(row * BLOCK + warpgroup * ROWS, ROWS)
    write(sums, staged.at[warpgroup], out.at[group, rows, pl.ds(column * width, width)])


def _clear(tile, first, start, end) -> None:
    """Rows of a tile in shared memory, of which the first is row `first`, become 0 outside of [start, end)."""
    for column in range(0, tile.shape[1], CLEARED):
        piece = tile.at[:, pl.ds(column, CLEARED)]
        x = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
        row = first + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
        piece[...] = jnp.where((row >= start) & (row < end), x, jnp.zeros_like(x))
    plgpu.commit_smem()
