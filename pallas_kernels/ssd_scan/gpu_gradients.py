"""The gradients of the state-space-duality scan on NVIDIA Hopper, all chunks at once.

With S the state before the chunk, dS' the gradient of that after it, decay_ts = exp(total_t - total_s) for s <= t and
g_ts = (dy_t · x_s) decay_ts:

    dC_t = Σ_heads Σ_s g_ts dt_s B_s + exp(total_t) Sᵀ dy_t
    dB_s = Σ_heads dt_s (Σ_t g_ts C_t + exp(total_Q - total_s) dS'ᵀ x_s)
    du_s = Σ_t (C_t · B_s) decay_ts dy_t + exp(total_Q - total_s) dS' B_s,  dx_s = dt_s du_s + D dy_s

and the gradients of dt and total are sums along the rows of these: x_s · du_s for dt_s, and for total_t

    Σ_s (C_t · B_s) g_ts dt_s + exp(total_t) dy_t · S C_t - dt_t x_t · du_t.

There is a kernel for what tokens read and one for what they write. One for both would read x and dy once where two
read them twice, but the sums for B and for C, [CHUNK, STATES] each, and the tiles that go into them do not fit into the
registers of one block. The tokens that are summed for lie along rows, so that every sum stays in one warpgroup, and a
gradient is the same each time. For want of registers, too, each head computes the products C_t · B_s again.
"""

import functools

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, WARPGROUPS, along
from pallas_kernels.ssd_scan import gpu_block
from pallas_kernels.ssd_scan.gpu_block import Work
from pallas_kernels.ssd_scan.gpu_chunk import (
    CHANNELS,
    STATES,
    decay,
    half,
    load_scale,
    load_tile,
    unless_empty,
)


def of_reading(x, d_y, B, C, scales, begins, pasts, adjoints, *, interpret):
    """What tokens read, differentiated.

    Args:
        x: bfloat16 [B, T, tiles, CHANNELS].
        d_y: likewise.
        B: bfloat16 [B, T, G, STATES].
        C: bfloat16 [B, T, G, STATES].
        scales: float32 [B, H, 3, T]: total / ln 2, dt, what a token reads of S.
        begins: int32 [B, T], the first token of the chunk that each one reads; None: the first one.
        pasts: S, bfloat16 [B, chunks, tiles, CHANNELS, STATES].
        adjoints: dS', likewise.
        interpret: as `hopper.call` takes it.

    Returns:
        float32 [B, tiles, 3, T]: Σ_s (C_t · B_s) g_ts dt_s, dy_t · S C_t, and numbers whose sum over a chunk is
        S · dS'; and dC like C.
    """
    sums, d_C = gpu_block.call(
        _reading_kernel,
        [x, d_y],
        B,
        C,
        scales,
        [pasts, adjoints],
        begins,
        out=(_sums_of_tiles(x, 3), _sums_of_blocks(x, B)),
        own=[],
        interpret=interpret,
        name="ssd_scan_gradients_reading",
    )
    return sums, _over_heads(d_C, C)


def _reading_kernel(work: Work, outputs, own) -> None:
    """Tokens that read are along rows, those that write along columns."""
    sums, d_C = outputs
    c = work.c.at[work.rows]

    def step(tile, pieces, c_sums):
        x, d_y, scales, past, adjoint = pieces
        d_y = d_y.at[work.rows]

        def add(part, carry):
            within, c_sums = carry
            similarity, gradient = hopper.products(
                (c, work.b.at[half(part)].T), (d_y, x.at[half(part)].T)
            )
            gradient *= decay(scales, work.warpgroup, part, work.bound, rows_read=True)
            gradient *= along(load_scale(scales, 1, part, 1), gradient.shape, 1)
            within += (similarity * gradient).sum(axis=1)
            b = work.b.at[half(part)]
            return within, hopper.add_product(c_sums, gradient, b, work.interpret)

        carry = hopper.zeros(ROWS), c_sums
        for part in range(WARPGROUPS):
            carry = unless_empty(
                work.warpgroup, part, functools.partial(add, part), carry, rows_read=True
            )
        within, c_sums = carry
        reads, d_reads = hopper.product(c, past.T), load_tile(d_y)
        # Each warpgroup has half of the columns.
        kept = load_tile(past.at[:, work.rows]) * load_tile(adjoint.at[:, work.rows])
        for row, vector in enumerate((within, (d_reads * reads).sum(axis=1), kept.sum(axis=1))):
            sums[work.batch, tile, row, work.tokens] = vector
        from_past = load_scale(scales, 2, work.warpgroup, 0)
        d_reads *= along(from_past, d_reads.shape, 0)
        return hopper.add_product(c_sums, d_reads, past, work.interpret)

    d_C[work.batch, work.block, work.tokens] = work.fold(step, hopper.zeros(ROWS, STATES))


def of_writing(x, d_y, B, C, scales, ends, adjoints, *, interpret):
    """What tokens write, differentiated.

    Args:
        scales: float32 [B, H, 3 or 4, T]: total / ln 2, dt, what is left at the end of the chunk of what a token
            writes, and D if there is one.
        ends: int32 [B, T], the last token of the chunk that reads each one; None: the last one.
        **others: as in `of_reading`.

    Returns:
        float32 [B, tiles, 2 or 3, T]: Σ_t (C_t · B_s) g_ts, x_s · dS' B_s, and x_s · dy_s if there is a D; dx like x;
        and dB like B.
    """
    sums, d_x, d_B = gpu_block.call(
        _writing_kernel,
        [x, d_y],
        B,
        C,
        scales,
        [adjoints],
        ends,
        out=(
            _sums_of_tiles(x, scales.shape[2] - 1),
            (x.shape, x.dtype),
            _sums_of_blocks(x, B),
        ),
        own=[((ROWS, CHANNELS), x.dtype)],
        interpret=interpret,
        name="ssd_scan_gradients_writing",
    )
    return sums, d_x, _over_heads(d_B, B)


def _writing_kernel(work: Work, outputs, own) -> None:
    """Tokens that write are along rows, those that read along columns."""
    sums, d_x, d_B = outputs
    (d_x_tile,) = own
    b = work.b.at[work.rows]

    def step(tile, pieces, b_sums):
        x, d_y, scales, adjoint = pieces
        x = x.at[work.rows]
        dt, to_end = (load_scale(scales, i, work.warpgroup, 0) for i in (1, 2))
        returns = hopper.product(b, adjoint.T)
        to_state = (load_tile(x) * returns).sum(axis=1)

        def add(part, carry):
            within, d_input, b_sums = carry
            c, d_output = work.c.at[half(part)], d_y.at[half(part)]
            similarity, gradient = hopper.products((b, c.T), (x, d_output.T))
            decays = decay(scales, work.warpgroup, part, work.bound, rows_read=False)
            weights = similarity * decays
            within += (weights * gradient).sum(axis=1)
            gradient *= decays * along(dt, decays.shape, 0)
            d_input, b_sums = hopper.add_products(
                (d_input, b_sums),
                (lambda: (weights, d_output), lambda: (gradient, c)),
                work.interpret,
            )
            return within, d_input, b_sums

        carry = hopper.zeros(ROWS), returns * along(to_end, returns.shape, 0), b_sums
        for part in range(WARPGROUPS):
            carry = unless_empty(
                work.warpgroup, part, functools.partial(add, part), carry, rows_read=False
            )
        within, d_input, b_sums = carry
        vectors = [within, to_state]
        d_input *= along(dt, d_input.shape, 0)
        # Read once more: until here other tiles have the registers.
        inputs = load_tile(x)
        if scales.shape[0] == 4:
            d_outputs, skip = load_tile(d_y.at[work.rows]), load_scale(scales, 3, work.warpgroup, 0)
            d_input += d_outputs * along(skip, d_outputs.shape, 0)
            vectors.append((inputs * d_outputs).sum(axis=1))
        # The tile before has left the shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        hopper.stage((d_input, d_x_tile))
        plgpu.copy_smem_to_gmem(d_x_tile, d_x.at[work.batch, work.tokens, tile])
        for row, vector in enumerate(vectors):
            sums[work.batch, tile, row, work.tokens] = vector
        writes = inputs * along(dt * to_end, inputs.shape, 0)
        return hopper.add_product(b_sums, writes, adjoint, work.interpret)

    d_B[work.batch, work.block, work.tokens] = work.fold(step, hopper.zeros(ROWS, STATES))
    plgpu.wait_smem_to_gmem(0)


def _sums_of_tiles(x, count: int):
    """Shape and dtype of `count` numbers a tile of channels and token."""
    batch, time, tiles, _ = x.shape
    return (batch, tiles, count, time), jnp.float32


def _sums_of_blocks(x, B):
    """Shape and dtype of what is summed over the tiles of a block."""
    batch, time, tiles, _ = x.shape
    return (batch, tiles // gpu_block.tiles_per_block(x, B), time, STATES), jnp.float32


def _over_heads(sums, like):
    """Sums [B, blocks, T, STATES] over the blocks of each group -> like B and C."""
    batch, time, groups, states = like.shape
    sums = sums.reshape(batch, groups, -1, time, states).sum(axis=2)
    return sums.swapaxes(1, 2).astype(like.dtype)
