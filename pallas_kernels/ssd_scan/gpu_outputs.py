"""The outputs of the state-space-duality scan on NVIDIA Hopper, all chunks at once: arXiv 2405.21060, section 6.

With S the state before the chunk and total the sum of dt A up to a token:

    y_t = Σ_{s<=t} (C_t · B_s) exp(total_t - total_s) dt_s x_s + exp(total_t) S C_t + D x_t
"""

import functools

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, WARPGROUPS, along
from pallas_kernels.ssd_scan import gpu_block
from pallas_kernels.ssd_scan.gpu_block import Work
from pallas_kernels.ssd_scan.gpu_chunk import (
    CHANNELS,
    decay,
    half,
    load_scale,
    load_tile,
    unless_empty,
)


def outputs(x, B, C, scales, begins, pasts, *, interpret):
    """y, like x.

    Args:
        x: bfloat16 [B, T, tiles, CHANNELS].
        B: bfloat16 [B, T, G, STATES].
        C: bfloat16 [B, T, G, STATES].
        scales: float32 [B, H, 3 or 4, T]: total / ln 2, dt, what a token reads of S, and D if there is one.
        begins: int32 [B, T], the first token of the chunk that each one reads; None: the first one.
        pasts: S, bfloat16 [B, chunks, tiles, CHANNELS, STATES].
        interpret: as `hopper.call` takes it.
    """
    (y,) = gpu_block.call(
        _kernel,
        [x],
        B,
        C,
        scales,
        [pasts],
        begins,
        out=((x.shape, x.dtype),),
        own=(((ROWS, CHANNELS), x.dtype),),
        interpret=interpret,
        name="ssd_scan_outputs",
    )
    return y


def _kernel(work: Work, outputs, own) -> None:
    """Tokens that read are along rows, those that write along columns."""
    (y,) = outputs
    (y_tile,) = own
    c = work.c.at[work.rows]
    # All heads of the group share the products C_t · B_s.
    similarities = hopper.products(*((c, work.b.at[half(i)].T) for i in range(WARPGROUPS)))

    def step(tile, pieces, carry):
        x, scales, past = pieces

        def add(part, y_sums):
            weights = similarities[part] * decay(
                scales, work.warpgroup, part, work.bound, rows_read=True
            )
            weights *= along(load_scale(scales, 1, part, 1), weights.shape, 1)
            return hopper.add_product(y_sums, weights, x.at[half(part)], work.interpret)

        reads = hopper.product(c, past.T)
        y_sums = reads * along(load_scale(scales, 2, work.warpgroup, 0), reads.shape, 0)
        if scales.shape[0] == 4:
            skip = load_scale(scales, 3, work.warpgroup, 0)
            y_sums += load_tile(x.at[work.rows]) * along(skip, y_sums.shape, 0)
        for part in range(WARPGROUPS):
            y_sums = unless_empty(
                work.warpgroup, part, functools.partial(add, part), y_sums, rows_read=True
            )
        # Until now the tile before had time to leave the shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        hopper.stage((y_sums, y_tile))
        plgpu.copy_smem_to_gmem(y_tile, y.at[work.batch, work.tokens, tile])
        return carry

    work.fold(step, ())
    plgpu.wait_smem_to_gmem(0)
