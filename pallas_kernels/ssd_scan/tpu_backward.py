"""The backward of the state-space-duality scan on TPU, one chunk of a few heads, from the last chunk to the first.

With S and S' the states before and after a tile of tokens, dS' the gradient of the latter, and for s <= t
w_st = (C_t · B_s) exp(total_t - total_s):

    dux_s   = Σ_t w_st dy_t + exp(total_Q - total_s) dS' B_s, the gradient of dt_s x_s
    dC_t    = Σ_heads Σ_s (dt_s x_s · dy_t) exp(total_t - total_s) B_s + exp(total_t) Sᵀ dy_t
    dB_s    = Σ_heads Σ_t (dt_s x_s · dy_t) exp(total_t - total_s) C_t + exp(total_Q - total_s) dt_s dS'ᵀ x_s
    dS      = exp(total_Q) dS' + Σ_t exp(total_t) dy_t C_tᵀ
    dtotal_t = Σ_s w_st (dt_s x_s · dy_t) + exp(total_t) C_t · Sᵀ dy_t - dt_t x_t · dux_t,
               and for the last token dS' · S' besides.

What a token reads of itself cancels in the last line, as both terms have the same rounded weight. Pairs of tokens are
[s, (head, t)] here, so that sums over s are over sublanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pipelined import pipelined
from pallas_kernels.ssd_scan.tpu_blocks import LANES
from pallas_kernels.ssd_scan.tpu_chunk import (
    LAST,
    LOG2_E,
    PLAIN,
    ROWS,
    Columns,
    Spec,
    block_diagonal,
    causal,
    column,
    decay,
    dot,
    from_rows,
    next_heads,
    packs,
    repeated,
    running_sums,
    scales,
    similarity,
    store_row,
    wide,
)


def kernel(
    spec: Spec, x, dt, log_decay, B, C, D, marks, past, d_y, d_last,
    d_x, d_dt, d_log_decay, d_B, d_C, d_D, d_initial,
    carry, states, wide_totals, steps, to_end, writes, d_rows, d_ends, d_columns, wide_d_B, wide_d_C,
) -> None:  # fmt: skip
    """Chunks come from the last to the first; the rest of the grid is that of the forward.

    Args:
        spec: static arguments.
        x: as in `tpu_forward.kernel`; so are dt, log_decay, B, C, D, marks.
        past: ref [N, channels], the state before the chunk.
        d_y: ref [tokens, channels].
        d_last: ref float32 [N, channels].
        d_x: ref like x.
        d_dt: ref like dt.
        d_log_decay: ref like log_decay.
        d_B: ref like B.
        d_C: ref like C.
        d_D: ref float32 [1, channels], the chunk's part; None: not wanted.
        d_initial: ref like d_last.
        carry: scratch float32 [steps, N, channels], the gradient of the state after a tile.
        states: scratch float32 [tiles + 1, N, channels], the states before the tiles and the one after the last.
        wide_totals: scratch float32 [tokens, channels], total.
        steps: scratch float32 [tokens, channels], dt.
        to_end: scratch float32 [tokens, channels], what is left at the end of a tile of what a token writes.
        writes: scratch like x, x times those two.
        d_rows: scratch float32 [tiles, heads, 128], gradients of the totals as `tpu_chunk.rows` has these.
        d_ends: scratch float32 [tiles, heads, 128], what the tile's last total gets besides, by channels.
        d_columns: scratch float32 [tokens of a tile, 128], what dt gets, in lane tile * heads + head.
        wide_d_B: scratch float32 [tokens, N], summed over heads.
        wide_d_C: scratch float32 [tokens, N], summed over heads.
    """
    sizes, chunk, step = spec.blocks, pl.program_id(2), pl.program_id(3)

    @pl.when(chunk == 0)
    def _():
        carry[step] = d_last[...]

    total = running_sums(sizes, log_decay[...] * LOG2_E)
    scale = [scales(sizes, tile, dt[...], total, marks) for tile in range(sizes.tiles)]
    totals = Columns(sizes, total, on_matrix_unit=True)
    states[0] = wide(past[...])
    _walk(sizes, scale, totals, dt, marks, x, B, states, wide_totals, steps, to_end, writes)
    _walk_back(
        sizes, step == 0, scale, totals, x, B, C, D, marks, d_y, d_x, d_B, d_C,
        carry.at[step], states, wide_totals, steps, to_end, writes, d_rows, d_ends, d_columns, wide_d_B, wide_d_C,
    )  # fmt: skip
    turned = d_columns[...].T
    by_tile = [turned[tile * sizes.heads :][: sizes.heads] for tile in range(sizes.tiles)]
    d_dt[...] = jnp.concatenate(by_tile, axis=1)
    within = from_rows(sizes, [d_rows[tile] for tile in range(sizes.tiles)])
    d_total = within + _at_ends(sizes, d_ends) - dt[...] * d_dt[...]
    d_log_decay[...] = running_sums(sizes, d_total, reverse=True)
    if d_D is not None:
        d_D[...] = _sum(wide(x[...]) * wide(d_y[...]))

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        d_initial[...] = carry[step]


def _walk(
    sizes, scale, totals, dt, marks, x, B, states, wide_totals, steps, to_end, writes
) -> None:
    """The states of the chunk's tiles from the first on, and on the way what scales a token for all its channels."""
    dt_columns = Columns(sizes, dt[...], on_matrix_unit=False)
    resets = None if marks is None else column(marks[2:3])

    @functools.cache
    def turned(tile):
        return B[pl.ds(tile * sizes.tile, sizes.tile)].T

    def bring(pack, _):
        turned(pack.tile)
        at, total = (pack.tokens, pack.channels), totals.spread(pack.tile, pack.head, sizes.dim)
        exponents = scale[pack.tile].row("ends", pack.head) - total
        if resets is not None:
            exponents += resets[pack.tile * sizes.tile :][: sizes.tile]
        wide_totals[at], to_end[at] = total, jnp.exp2(exponents)
        steps[at] = dt_columns.spread(pack.tile, pack.head, sizes.dim)

    def multiply(pack, _):
        at = (pack.tokens, pack.channels)
        write = (wide(x[at]) * (steps[at] * to_end[at])).astype(writes.dtype)
        writes[at] = write
        return dot(turned(pack.tile), write, PLAIN)

    def advance(pack, written):
        kept = states[pack.tile, :, pack.channels] * scale[pack.tile].row("kept", pack.head)
        states[pack.tile + 1, :, pack.channels] = kept + written

    pipelined(packs(sizes), bring, multiply, advance)


def _walk_back(
    sizes, is_first, scale, totals, x, B, C, D, marks, d_y, d_x, d_B, d_C,
    adjoint, states, wide_totals, steps, to_end, writes, d_rows, d_ends, d_columns, wide_d_B, wide_d_C,
):  # fmt: skip
    """From the last tile to the first, with `adjoint` [N, channels] the gradient of the state after a tile."""
    dtype = x.dtype

    @functools.cache
    def of_tile(tile):
        tokens = pl.ds(tile * sizes.tile, sizes.tile)
        seen = causal(sizes, tile, marks, reading_on_rows=False)
        return seen, *similarity(sizes, B[tokens], C[tokens])

    def bring(pack, _):
        of_tile(pack.tile)
        if sizes.dim == sizes.tile:
            return wide_totals[pack.tokens, pack.channels]
        return totals.spread(pack.tile, pack.head, sizes.tile)

    def prepare(pack, brought):
        is_seen, similarities, C_turned = of_tile(pack.tile)
        decays = decay(is_seen, scale[pack.tile].row("total", pack.head) - brought)
        weights = (similarities * decays).astype(dtype)
        reads = (C_turned * scale[pack.tile].row("from_past", pack.head)).astype(dtype)
        left = jnp.concatenate([weights, reads], axis=0)
        return decays, weights, left, block_diagonal(sizes, d_y[pack.tokens, pack.channels])

    def multiply(pack, prepared):
        decays, weights, left, by_head = prepared
        state = states[pack.tile, :, pack.channels].astype(dtype)
        right = jnp.concatenate([x[pack.tokens, pack.channels], state], axis=0)
        return decays, weights, dot(left, by_head, PLAIN), dot(right, by_head, LAST)

    def advance(pack, multiplied):
        decays, weights, gradients, products = multiplied
        after = adjoint[:, pack.channels]
        returns = dot(B[pack.tokens], after.astype(dtype), PLAIN)
        d_B_part = dot(writes[pack.tokens, pack.channels], after.astype(dtype), LAST)
        at_end = _sum(after * states[pack.tile + 1, :, pack.channels])
        store_row(d_ends.at[pack.tile], pack.head, at_end, sizes.dim)
        kept = after * scale[pack.tile].row("kept", pack.head)
        adjoint[:, pack.channels] = kept + gradients[sizes.tile :]
        return decays, weights, gradients[: sizes.tile], products, returns, d_B_part

    sums = {}

    def finish(pack, advanced):
        decays, weights, gradients, products, returns, d_B_part = advanced
        at, C_turned = (pack.tokens, pack.channels), of_tile(pack.tile)[2]
        d_stepped = gradients + returns * to_end[at]
        _sum_channels(sizes, pack, wide(x[at]) * d_stepped, d_columns)
        d_input = d_stepped * steps[at]
        if D is not None:
            d_input += wide(d_y[at]) * D[:, pack.channels]
        d_x[at] = d_input.astype(dtype)

        if sizes.dim == sizes.tile:
            step = steps[at]
        else:
            step = jnp.concatenate(
                [
                    jnp.broadcast_to(steps[pack.tokens, pl.ds(first, 1)], (sizes.tile, sizes.tile))
                    for first in range(
                        pack.head * sizes.dim, (pack.head + sizes.pack) * sizes.dim, sizes.dim
                    )
                ],
                axis=1,
            )
        pairs = products[: sizes.tile] * step
        read = products[sizes.tile :] * scale[pack.tile].row("from_past", pack.head)
        d_totals = _sum(jnp.concatenate([pairs * wide(weights), C_turned * read], axis=0))
        store_row(d_rows.at[pack.tile], pack.head, d_totals, sizes.tile)

        parts = pairs * decays, read, d_B_part
        before = sums.get(pack.tile)
        sums[pack.tile] = (
            parts if before is None else [x + y for x, y in zip(before, parts, strict=True)]
        )
        if pack.head == sizes.heads - sizes.pack:
            finish_tile(pack.tokens, *sums.pop(pack.tile))

    def finish_tile(tokens, d_similarities, d_C_turned, d_B_tile):
        d_similarities = d_similarities.astype(dtype)
        d_B_tile += dot(d_similarities, repeated(sizes, C[tokens]), PLAIN)
        d_C_turned += dot(B[tokens], d_similarities, ROWS)
        shape = (sizes.tile, sizes.pack_tokens)
        i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        d_C_tile = dot((i == j % sizes.tile).astype(dtype), d_C_turned.astype(dtype), LAST)
        for part, wide_sum, out in ((d_B_tile, wide_d_B, d_B), (d_C_tile, wide_d_C, d_C)):
            total = jnp.where(is_first, 0, wide_sum[tokens]) + part
            wide_sum[tokens] = total
            out[tokens] = total.astype(out.dtype)

    by_tile = sorted(packs(sizes), key=lambda pack: (-pack.tile, pack.head))
    pipelined(by_tile, bring, prepare, multiply, advance, finish)


def _sum_channels(sizes, pack, x, sums) -> None:
    """Puts sums over the channels of each head, [token, (head, channel)] -> [token, 1], into their lanes."""
    for i in range(sizes.pack):
        first = i * sizes.dim // LANES * LANES
        part = x[:, first : max(first + LANES, (i + 1) * sizes.dim)]
        if sizes.dim < LANES:
            lane = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1) + first
            part = jnp.where(lane // sizes.dim == i, part, 0)
        place = pack.tile * sizes.heads + pack.head + i
        sums[:, place : place + 1] = jnp.sum(part, axis=1, keepdims=True)


def _at_ends(sizes, d_ends):
    """The sums over channels at the last token of each tile: [heads, tokens]."""
    by_tile = []
    for tile in range(sizes.tiles):
        parts, sums = d_ends[tile], 0
        shape = (sizes.heads, sizes.tile)
        head = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        token = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        for i in range(max(1, LANES // sizes.dim)):
            lane = jax.lax.broadcasted_iota(jnp.int32, parts.shape, 1)
            part = jnp.where(lane // sizes.dim == i, parts, 0) if sizes.dim < LANES else parts
            part = next_heads(jnp.sum(part, axis=1, keepdims=True), -i)
            is_here = (head % max(1, LANES // sizes.dim) == i) & (token == sizes.tile - 1)
            sums += jnp.where(is_here, part, 0)
        by_tile.append(sums)
    return jnp.concatenate(by_tile, axis=1)


def _sum(x):
    """Over rows."""
    return jnp.sum(x, axis=0, keepdims=True)
