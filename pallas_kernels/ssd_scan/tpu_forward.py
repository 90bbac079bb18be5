"""The forward of the state-space-duality scan on TPU, one chunk of a few heads: arXiv 2405.21060, section 6.

With S the state before a tile of tokens, total the sum of dt A from its beginning and Q its last token:

    y_t = Σ_{s<=t} (C_t · B_s) exp(total_t - total_s) dt_s x_s + exp(total_t) S C_t + D x_t
    S'  = exp(total_Q) S + Σ_s exp(total_Q - total_s) dt_s x_s B_sᵀ
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pipelined import pipelined
from pallas_kernels.ssd_scan.tpu_blocks import LANES
from pallas_kernels.ssd_scan.tpu_chunk import (
    FEW,
    PLAIN,
    Columns,
    Spec,
    States,
    all_registers,
    block_diagonal,
    column,
    for_pack,
    head_blocks,
    heads_of,
    packs,
    scales,
    seen,
    totals,
    wide,
)
from pallas_kernels.tpu_dot import dot

# Packs that a stage takes one after the other where there are more than `FEW`, by whether a pack is of two registers.
TOGETHER = {True: 6, False: 8}


def kernel(
    spec: Spec, x, dt, A, B, C, D, marks, initial, y, last, pasts, all_totals, carry, mask
) -> None:
    """The grid is batch x groups x chunks x steps of heads.

    Args:
        spec: static arguments.
        x: ref [tokens, channels].
        dt: ref float32 [heads, tokens].
        A: ref float32 [heads, 128], a rate in all lanes.
        B: ref [tokens, N], or [N, tokens] where `Blocks.turned`.
        C: ref like B.
        D: ref float32 [1, channels]; None: 0.
        marks: ref float32 [4, tokens], `tpu.segment_marks`; None: one segment.
        initial: ref float32 [N, channels], the state before the first chunk; None: 0.
        y: ref [tokens, channels].
        last: ref float32 [N, channels], the state after the last chunk.
        pasts: ref [tiles, N, channels], the state before each tile; None: not wanted.
        all_totals: ref like dt, `tpu_chunk.Registers.total` of all tokens; None: not wanted.
        carry: scratch float32 [steps, N, channels].
        mask: scratch uint32 [rows, (head, token)], `_bits` of `tpu_chunk.seen` where there are no marks.
    """
    sizes, chunk, step = spec.blocks, pl.program_id(2), pl.program_id(3)

    @pl.when(chunk == 0)
    def _():
        carry[step] = jnp.zeros_like(carry[step]) if initial is None else initial[...]

    def seen_bits(tile):
        return _bits(seen(sizes, tile, marks, reading_on_rows=True), x.dtype)

    if marks is None:
        mask[...] = seen_bits(0)
    resets = None if marks is None else column(marks[1:2])

    registers = all_registers(sizes, dt, totals(sizes, dt, A, x.dtype), marks)
    if all_totals is not None:
        for number in range(sizes.chunk // LANES):
            total = registers[number // sizes.together].total
            all_totals[:, pl.ds(number * LANES, LANES)] = heads_of(sizes, total, number)
    columns = [Columns(sizes, of.total) for of in registers]

    B, C = States(sizes, B), States(sizes, C)

    @functools.cache
    def of_place(group, place):
        return scales(sizes, place, registers[group])

    @functools.cache
    def of_tile(tile):
        similarities = dot(C.rows(tile), B.turned(tile), PLAIN)
        bits = mask[...] if marks is None else seen_bits(tile)
        return of_place(sizes.group(tile), sizes.place(tile)), bits, similarities

    def bring(pack, _):
        of_tile(pack.tile)
        return columns[sizes.group(pack.tile)].of_pack(pack)

    def prepare(pack, brought):
        """The operands of the products, and what is left of the state before the tile."""
        for_tokens, for_channels = brought
        scale, bits, similarities = of_tile(pack.tile)
        write = for_pack(sizes, B.turned(pack.tile)) * scale.row("to_end", pack).astype(x.dtype)
        decays = jnp.exp2(for_tokens - scale.row("written", pack))
        weights = (for_pack(sizes, similarities) * decays).astype(x.dtype)
        weights = pltpu.bitcast(pltpu.bitcast(weights, jnp.uint32) & bits, x.dtype)
        # First what does not wait for the decays, and what the next tile waits for.
        left = jnp.concatenate([write, weights], axis=0)
        if resets is not None:
            for_channels += resets[pack.tile * sizes.tile :][: sizes.tile]
        return (
            left,
            block_diagonal(head_blocks(sizes, x[pack.tokens, pack.channels])),
            jnp.exp2(for_channels),
        )

    def multiply(pack, prepared):
        left, right, from_past = prepared
        return dot(left, right, PLAIN), from_past

    def advance(pack, multiplied):
        sums, from_past = multiplied
        state = carry[step, :, pack.channels]
        rounded = state.astype(x.dtype)
        if pasts is not None:
            pasts[pack.tile, :, pack.channels] = rounded
        read = dot(C.rows(pack.tile), rounded, PLAIN)
        kept = state * of_tile(pack.tile)[0].row("kept", pack)
        written, output = sums[: -sizes.tile], sums[-sizes.tile :]
        carry[step, :, pack.channels] = kept + written
        return output, read, from_past

    def put(pack, advanced):
        output, read, from_past = advanced
        output += read * from_past
        if D is not None:
            output += wide(x[pack.tokens, pack.channels]) * D[:, pack.channels]
        y[pack.tokens, pack.channels] = output.astype(y.dtype)

    stages = (bring, prepare, multiply, advance, put)
    of_all = packs(sizes)
    together = FEW if len(of_all) <= FEW else TOGETHER[sizes.pack_channels > LANES]
    pipelined(of_all, *stages, together=together)

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        last[...] = carry[step]


def _bits(is_seen, dtype):
    """All bits of what is seen of [rows, lanes] of `dtype`, and none of the rest, which may be anything: uint32."""
    integer = jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")
    return pltpu.bitcast(jnp.where(is_seen, -1, 0).astype(integer), jnp.uint32)
