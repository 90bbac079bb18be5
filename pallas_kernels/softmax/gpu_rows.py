"""How the GPU kernels of softmax go over [N, V]: a warp has a row, and reads tiles of its columns into registers.

No length is filled up: where V is no multiple of a tile, the last one begins earlier and meets some columns again,
which sums leave out and outputs are written twice. Blocks of rows do the same.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper

# Rows of a block.
WARPS = 4
LANES = 32
# The widest load of a lane, and what it has of a tile: so much of each warp is on its way from memory at a time.
BYTES_OF_LOAD, BYTES_OF_LANE = 16, 64


class Tiles(NamedTuple):
    """The tiles [WARPS, width] of rows of V columns.

    Attributes:
        columns: V, at least `width`.
        width: columns of a tile.
        vector: neighbouring columns of a lane, a divisor of V.
    """

    columns: int
    width: int
    vector: int

    @property
    def layout(self):
        return plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, LANES * self.vector), (self.vector,))),
            warp_dims=(-3,),
            lane_dims=(-2,),
            vector_dim=-1,
        )

    def fold(self, function, carry):
        """`carry = function(columns, fresh, carry)` for every tile.

        `columns` is where it lies; `fresh` numbers the first of its columns that no tile before had, None for 0.
        """
        whole, rest = divmod(self.columns, self.width)

        def step(i, carry):
            return function(pl.ds(i * self.width, self.width), None, carry)

        carry = jax.lax.fori_loop(0, whole, step, carry)
        if rest:
            last = pl.ds(self.columns - self.width, self.width)
            carry = function(last, self.width - rest, carry)
        return carry


def tiles(columns: int, itemsize: int) -> Tiles:
    """For rows of `columns` entries, `LANES` or more."""
    vector = math.gcd(columns, BYTES_OF_LOAD // itemsize)
    while vector * LANES > columns:
        vector //= 2
    width = vector * LANES
    while 2 * width <= min(columns, LANES * BYTES_OF_LANE // itemsize):
        width *= 2
    return Tiles(columns, width, vector)


def pad(x):
    """[N, V] with a tile at least: -inf fills up fewer columns than a warp has lanes, and fewer rows than warps."""
    more = [(0, max(0, least - size)) for least, size in zip((WARPS, LANES), x.shape, strict=True)]
    return jnp.pad(x, more, constant_values=-jnp.inf)


def call(kernel, arguments, *, out, interpret, name: str):
    """Runs `kernel(tiles, rows, *references)` for blocks of rows of `arguments`, the first of which is [N, V].

    Args:
        kernel: its `rows` is a slice of N.
        arguments: arrays [N, V] or [N].
        out: (shape, dtype) of each output.
        interpret: None to compile, or a `plgpu.InterpretGPUParams`.
        name: name of the kernel.
    """
    num_rows, columns = arguments[0].shape

    def body(*references):
        start = jnp.minimum(jax.lax.axis_index("rows") * WARPS, num_rows - WARPS)
        kernel(
            tiles(columns, arguments[0].dtype.itemsize),
            pl.ds(start, WARPS),
            *references,
        )

    return hopper.call(
        body,
        arguments,
        out=out,
        grid={"rows": -(-num_rows // WARPS)},
        interpret=interpret,
        name=name,
        has_warpgroups=False,
        has_barriers=False,  # There is no shared memory to be ordered.
    )


# Registers.


def load_tile(tiles: Tiles, ref):
    """HBM [WARPS, width] -> registers, float32."""
    return plgpu.load(ref, layout=tiles.layout, optimized=False).astype(jnp.float32)


def load_vector(tiles: Tiles, ref):
    """HBM [WARPS] -> registers: each lane has what belongs to its row."""
    return plgpu.load(ref, layout=tiles.layout.reduce(1), optimized=False)


def store(ref, x) -> None:
    """Registers -> HBM."""
    plgpu.store(ref, x.astype(ref.dtype), optimized=False)


def zeros(tiles: Tiles):
    """A sum for each row."""
    return plgpu.layout_cast(jnp.zeros(WARPS, jnp.float32), tiles.layout.reduce(1))


def along_columns(vector, shape):
    """[WARPS] -> [WARPS, width]."""
    return jax.lax.broadcast_in_dim(vector, shape, (0,))


def column_numbers(tiles: Tiles):
    """0, 1, ... along each row of a tile: int32 [WARPS, width]."""
    shape = (WARPS, tiles.width)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=tiles.layout)


def where_fresh(tiles: Tiles, fresh, x, fill):
    """x with `fill` in the columns that a tile before had."""
    return x if fresh is None else jnp.where(column_numbers(tiles) >= fresh, x, fill)
