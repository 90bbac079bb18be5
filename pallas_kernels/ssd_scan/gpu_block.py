"""A block of the GPU kernels that take all chunks at once: some tiles of channels of one chunk.

The heads of a group share B and C, which stay in shared memory while x and the states of one tile after the other pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import MULTIPROCESSORS, ROWS, WARPGROUPS
from pallas_kernels.ssd_scan.gpu_chunk import CHANNELS, CHUNK, STATES, half

# Blocks that a grid should have at least.
BLOCKS = 2 * MULTIPROCESSORS


class Work(NamedTuple):
    """What a warpgroup of a block has: half of the tokens of the chunk, as rows.

    Attributes:
        warpgroup: its index, and that of its half.
        batch: index.
        chunk: index.
        block: index of the tiles.
        share: how many tiles of channels a block takes.
        b: B [CHUNK, STATES] in shared memory.
        c: C, likewise.
        bound: int32, for each row the bound that `gpu_chunk.decay` takes, or None.
        tiles: of channels.
        interpret: as `hopper.call` takes it.
    """

    warpgroup: jax.Array
    batch: jax.Array
    chunk: jax.Array
    block: jax.Array
    share: int
    b: Any
    c: Any
    bound: jax.Array | None
    tiles: hopper.Tiles
    interpret: Any

    @property
    def rows(self):
        """Those tokens in the chunk."""
        return half(self.warpgroup)

    @property
    def tokens(self):
        """Those tokens in all of time."""
        return _own_tokens(self.chunk, self.warpgroup)

    def fold(self, function, carry):
        """`carry = function(tile, pieces, carry)` for every tile of channels."""
        first = self.block * self.share
        return self.tiles.fold(lambda i, pieces, carry: function(first + i, pieces, carry), carry)


def tiles_per_block(x, B) -> int:
    """Tiles of channels, all of one group, that a block takes of x [B, T, tiles, CHANNELS].

    A block loads B and C once, and what it sums over its tiles for them reaches HBM once; but there should be `BLOCKS`.
    """
    batch, time, tiles, _ = x.shape
    per_group = tiles // B.shape[2]
    blocks = batch * time // CHUNK * tiles
    most = max(1, blocks // BLOCKS)
    return max(
        share for share in range(1, per_group + 1) if per_group % share == 0 and share <= most
    )


def call(kernel: Callable, per_tile, B, C, scales, states, bounds, *, out, own, interpret, name):
    """Runs `kernel(work, outputs, own)` on every warpgroup.

    Args:
        kernel: gets a `Work`, references to the outputs, and its own shared memory.
        per_tile: arrays [B, T, tiles, CHANNELS], of which the ring holds a chunk of a tile.
        B: [B, T, G, STATES].
        C: [B, T, G, STATES].
        scales: float32 [B, H, rows, T], the next piece in the ring.
        states: arrays [B, chunks, tiles, CHANNELS, STATES], the last pieces.
        bounds: int32 [B, T], or None.
        out: (shape, dtype) of each output.
        own: (shape, dtype) of the shared memory of each warpgroup.
        interpret: as `hopper.call` takes it; so is `name`.
    """
    x = per_tile[0]
    batch, time, tiles, _ = x.shape
    share = tiles_per_block(x, B)
    arguments = (tuple(per_tile), B, C, scales, tuple(states), () if bounds is None else (bounds,))
    leaves, tree = jax.tree.flatten(arguments)

    def body(*refs):
        inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
        outputs, scratch = refs[len(leaves) :][: len(out)], refs[len(leaves) + len(out) :]
        _run(kernel, share, interpret, inputs, outputs, *scratch)

    return hopper.call(
        body,
        leaves,
        out=out,
        scratch=(
            plgpu.SMEM((CHUNK, STATES), B.dtype),
            plgpu.SMEM((CHUNK, STATES), C.dtype),
            plgpu.Barrier(num_arrivals=2),
            [plgpu.SMEM((WARPGROUPS, *shape), dtype) for shape, dtype in own],
            hopper.ring(
                *(((CHUNK, CHANNELS), array.dtype) for array in per_tile),
                ((scales.shape[2], CHUNK), scales.dtype),
                *(((CHANNELS, STATES), array.dtype) for array in states),
            ),
        ),
        grid={"batch": batch, "chunk": time // CHUNK, "block": tiles // share},
        interpret=interpret,
        name=name,
    )


def _run(kernel, share: int, interpret, inputs, outputs, b, c, filled, own, ring) -> None:
    per_tile, B, C, scales, states, bounds = inputs
    batch, chunk, block = (jax.lax.axis_index(name) for name in ("batch", "chunk", "block"))
    num_tiles = per_tile[0].shape[2]
    warpgroup = jax.lax.axis_index("warpgroup")
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    group = jax.lax.div(block * share, num_tiles // B.shape[2])

    @pl.when(warpgroup == 0)
    def _():
        plgpu.copy_gmem_to_smem(B.at[batch, tokens, group], b, filled)
        plgpu.copy_gmem_to_smem(C.at[batch, tokens, group], c, filled)

    def pieces(i):
        tile = block * share + i
        for array in per_tile:
            yield array.at[batch, tokens, tile]
        yield scales.at[batch, jax.lax.div(tile, num_tiles // scales.shape[1]), :, tokens]
        for array in states:
            yield array.at[batch, chunk, tile]

    tiles = ring.start(share, pieces)
    own_tokens = _own_tokens(chunk, warpgroup)
    bound = hopper.load_vector(bounds[0].at[batch, own_tokens], 0) if bounds else None
    plgpu.barrier_wait(filled)
    work = Work(warpgroup, batch, chunk, block, share, b, c, bound, tiles, interpret)
    kernel(work, outputs, [ref.at[warpgroup] for ref in own])


def _own_tokens(chunk, warpgroup):
    return pl.ds(chunk * CHUNK + warpgroup * ROWS, ROWS)
