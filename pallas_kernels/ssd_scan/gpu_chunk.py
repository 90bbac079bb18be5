"""Tiles of one chunk of the state-space-duality scan as the GPU kernels have them: sizes, loads and decays.

Time comes in chunks of 128 tokens, of which each of two warpgroups takes 64 as rows. A head's P channels come in tiles
of 64, the 128 bytes that a row of shared memory has at its widest swizzle, and N is filled up to 128, what published
models have. Tiles of a head share its decays, tiles of a group its B and C.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ROWS, WARPGROUPS, along, load_vector

LOG2_E = math.log2(math.e)
# Tokens of a chunk.
CHUNK = WARPGROUPS * ROWS
# Channels of a tile, which are rows of a state.
CHANNELS = ROWS
# N, filled up: columns of a state.
STATES = WARPGROUPS * ROWS


def half(index):
    """Of the tokens of a chunk, or of the columns of a state, one of the two halves."""
    return pl.ds(index * ROWS, ROWS)


def load_tile(ref):
    """A tile in HBM or shared memory -> registers, float32."""
    tile = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
    return tile.astype(jnp.float32)


def load_scale(scales, which: int, part, axis: int):
    """Row `which` of float32 [rows, CHUNK] for half of the tokens, as these lie along `axis` of a tile."""
    return load_vector(scales.at[which, half(part)], axis)


def decay(scales, row_part, column_part, bound, *, rows_read: bool):
    """exp of the sum of dt A from the token that writes to the one that reads, [ROWS, ROWS]; 0 if none reads the other.

    Args:
        scales: float32 [rows, CHUNK] in shared memory, whose first row is the sum of dt A / ln 2 up to a token.
        row_part: which half of the chunk is along rows.
        column_part: which one is along columns.
        bound: int32 along rows, the first token that each one reads, or the last that reads it; None where the whole
            chunk is one segment.
        rows_read: tokens along rows read what those along columns write; else it is the other way round.
    """
    shape = (ROWS, ROWS)
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) + part * ROWS
        for axis, part in ((0, row_part), (1, column_part))
    )
    row_total, column_total = (
        along(load_scale(scales, 0, part, axis), shape, axis)
        for axis, part in ((0, row_part), (1, column_part))
    )
    if rows_read:
        difference, is_read = row_total - column_total, column <= row
    else:
        difference, is_read = column_total - row_total, row <= column
    if bound is not None:
        bound = along(bound, shape, 0)
        is_read &= column >= bound if rows_read else column <= bound
    return jnp.exp2(jnp.where(is_read, difference, -jnp.inf))


def unless_empty(row_part, column_part: int, function, carry, *, rows_read: bool):
    """`function(carry)`, or `carry` where no token along rows reads, or is read by, one along columns."""
    if column_part == (0 if rows_read else WARPGROUPS - 1):
        return function(carry)
    is_visited = column_part <= row_part if rows_read else row_part <= column_part
    return jax.lax.cond(is_visited, function, lambda carry: carry, carry)
