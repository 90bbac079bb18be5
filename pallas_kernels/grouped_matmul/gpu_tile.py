"""What the two GPU kernels share: tiles, and a tile of an output on its way to HBM."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, WARPGROUPS

# Rows of a block's output, and entries that a product of tiles sums over.
BLOCK = WARPGROUPS * ROWS
# Columns that are staged together: 32 KiB of shared memory beside the 192 KiB of the widest ring.
STAGED = 128


def pad(x):
    """x with its last two axes padded to whole tiles of zeros."""
    missing = [(0, -size % BLOCK) for size in x.shape[-2:]]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + missing)


def columns(size: int) -> int:
    """Columns of a block's output: as many as registers hold the sums of, where that divides `size`."""
    return 2 * BLOCK if size % (2 * BLOCK) == 0 else BLOCK


def write(sums, staged, destination, first=0, count=ROWS) -> None:
    """Rows [first, first + count) of `sums` -> those of `destination`, both of ROWS rows.

    A copy has a static number of rows, so that there is one for every bit of `count`.
    """
    for column in range(0, sums.shape[1], STAGED):
        if column:  # The copies of the columns before still read.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        hopper.stage((sums[:, column : column + STAGED], staged))
        target = destination.at[:, pl.ds(column, STAGED)]
        if isinstance(count, int):
            plgpu.copy_smem_to_gmem(staged, target)
            continue
        row = first
        for rows in (1 << bit for bit in reversed(range(ROWS.bit_length()))):
            is_part = jax.lax.rem(jax.lax.div(count, rows), 2) == 1

            @pl.when(is_part)
            def _(rows=rows, row=row, target=target):
                piece = pl.ds(row, rows)
                plgpu.copy_smem_to_gmem(staged.at[piece], target.at[piece])

            row += jnp.where(is_part, rows, 0)
    plgpu.wait_smem_to_gmem(0)
