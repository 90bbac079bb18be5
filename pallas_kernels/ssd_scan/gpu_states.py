"""States before each chunk on NVIDIA Hopper, and with time reversed their gradients after each chunk.

Dao and Gu, arXiv 2405.21060, section 6: with S the state before a chunk and total the sum of dt A up to a token,

    S'  = exp(total_Q) S + Σ_s exp(total_Q - total_s) dt_s x_s B_sᵀ,
    dS  = exp(total_Q) dS' + Σ_t exp(total_t) dy_t C_tᵀ,

which is one recurrence over chunks, of other arrays and in the other direction.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import WARPGROUPS, along
from pallas_kernels.ssd_scan.gpu_chunk import (
    CHANNELS,
    CHUNK,
    STATES,
    half,
    load_scale,
    load_tile,
)

HALF = STATES // WARPGROUPS


def states(x, B, scales, first, *, reverse: bool, interpret, name: str):
    """The state that each chunk finds, and the one that the last chunk leaves.

    Args:
        x: bfloat16 [B, T, tiles, CHANNELS]; dy for gradients.
        B: bfloat16 [B, T, G, STATES]; C for gradients.
        scales: float32 [B, H, 2, T]: the factor of a token's x Bᵀ, and what a chunk keeps of the state.
        first: float32 [B, tiles, CHANNELS, STATES], what the first chunk finds.
        reverse: from the last chunk to the first.
        interpret: as `hopper.call` takes it; so is `name`.

    Returns:
        `(bfloat16 [B, chunks, tiles, CHANNELS, STATES], float32 like first)`.
    """
    batch, time, tiles, _ = x.shape
    return hopper.call(
        functools.partial(_kernel, reverse),
        (x, B, scales, first),
        out=(
            ((batch, time // CHUNK, *first.shape[1:]), x.dtype),
            (first.shape, first.dtype),
        ),
        scratch=(
            plgpu.SMEM((WARPGROUPS, CHUNK, HALF), B.dtype),
            plgpu.SMEM((WARPGROUPS, CHANNELS, HALF), x.dtype),
            hopper.ring(
                ((CHUNK, CHANNELS), x.dtype),
                ((CHUNK, STATES), B.dtype),
                ((2, CHUNK), scales.dtype),
            ),
        ),
        grid={"batch": batch, "tile": tiles},
        interpret=interpret,
        name=name,
    )


def _kernel(reverse: bool, x, B, scales, first, found, last, scaled_tiles, found_tiles, ring):
    """A block: all chunks of a tile of channels; a warpgroup has the half of the columns of its state in registers."""
    batch, tile = (jax.lax.axis_index(name) for name in ("batch", "tile"))
    num_chunks = found.shape[1]
    tiles = x.shape[2]
    head = jax.lax.div(tile, tiles // scales.shape[1])
    group = jax.lax.div(tile, tiles // B.shape[2])

    def chunk(i):
        return num_chunks - 1 - i if reverse else i

    warpgroup = jax.lax.axis_index("warpgroup")

    def pieces(i):
        tokens = pl.ds(chunk(i) * CHUNK, CHUNK)
        yield x.at[batch, tokens, tile]
        yield B.at[batch, tokens, group]
        yield scales.at[batch, head, :, tokens]

    chunks = ring.start(num_chunks, pieces)

    columns = half(warpgroup)
    scaled_tile, found_tile = scaled_tiles.at[warpgroup], found_tiles.at[warpgroup]

    def accumulate(i, pieces, state):
        x_tile, b_tile, rows = pieces
        b = load_tile(b_tile.at[:, columns])
        scale, kept = hopper.load_vector(rows.at[0], 0), load_scale(rows, 1, 0, 0)
        # The state of the chunk before has left the shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        hopper.stage((state, found_tile), (b * along(scale, b.shape, 0), scaled_tile))
        plgpu.copy_smem_to_gmem(found_tile, found.at[batch, chunk(i), tile, :, columns])
        return state * along(kept, state.shape, 0) + hopper.product(x_tile.T, scaled_tile)

    # Under `jax.shard_map` what comes from HBM varies over the mesh for JAX, and what comes from shared memory does
    # not, nor does a sum of the two: the state begins as it goes on.
    state = hopper.zeros(CHANNELS, HALF) + load_tile(first.at[batch, tile, :, columns])
    last[batch, tile, :, columns] = chunks.fold(accumulate, state)
    plgpu.wait_smem_to_gmem(0)
