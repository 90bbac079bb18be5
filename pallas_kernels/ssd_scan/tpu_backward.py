"""The backward of the state-space-duality scan on TPU, one chunk of a few heads, from the last chunk to the first.

With S the state before the chunk, dS' the gradient of that after it, w_st = (C_t · B_s) exp(total_t - total_s) for
s <= t and ux_s = dt_s x_s:

    dux_s   = Σ_t w_st dy_t + exp(total_Q - total_s) dS' B_s
    dC_t    = Σ_heads Σ_s (ux_s · dy_t) exp(total_t - total_s) B_s + exp(total_t) Sᵀ dy_t
    dB_s    = Σ_heads Σ_t (ux_s · dy_t) exp(total_t - total_s) C_t + exp(total_Q - total_s) dS'ᵀ ux_s
    dS      = exp(total_Q) dS' + Σ_t exp(total_t) dy_t C_tᵀ
    dtotal_t = dy_t · y_t - ux_t · dux_t, and for the last token dS' · S' besides, D and its part of y left out.

The last line needs no sums over weights. What a token reads of itself cancels in it, as both products take the same
rounded weights and vectors.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ssd_scan.tpu_blocks import TILE
from pallas_kernels.ssd_scan.tpu_chunk import (
    LANES,
    PLAIN,
    ROWS,
    Spec,
    allowed,
    by_head,
    dot,
    lanes,
    scales,
    similarity,
    stack,
    wide,
)


def kernel(
    spec: Spec, x, dt, total, B, C, D, rows, past, d_y, d_last,
    d_x, d_dt, d_total, d_B, d_C, d_D, d_initial,
    carry, similarities, d_similarities, wide_d_B, wide_d_C,
) -> None:  # fmt: skip
    """Chunks come from the last to the first; the rest of the grid is that of the forward.

    Args:
        spec: static arguments.
        x: as in `tpu_forward.kernel`; so are dt, total, B, C, D, rows.
        past: ref [heads * P, N], the state before the chunk.
        d_y: ref [Q, heads * P].
        d_last: ref float32 [heads * P, N].
        d_x: ref like x.
        d_dt: ref like dt.
        d_total: ref like total, the gradient of the sum of dt A from the beginning of the chunk.
        d_B: ref like B.
        d_C: ref like C.
        d_D: ref like D, a number a token; None: not wanted.
        d_initial: ref like d_last.
        carry: scratch float32 [steps, heads * P, N], the gradient of the state after the chunk.
        similarities: scratch float32 [Q, Q].
        d_similarities: scratch float32 [Q, Q], summed over heads.
        wide_d_B: scratch float32 [Q, N], summed over heads.
        wide_d_C: scratch float32 [Q, N], summed over heads.
    """
    chunk, step = pl.program_id(2), pl.program_id(3)

    @pl.when(chunk == 0)
    def _():
        carry[step] = d_last[...]

    @pl.when(step == 0)
    def _():
        similarities[...] = similarity(B, C, rows)
        for sums in (d_similarities, wide_d_B, wide_d_C):
            sums[...] = jnp.zeros_like(sums)

    _heads(
        spec, step, x, dt, total, B, C, D, rows, past, d_y,
        d_x, d_dt, d_total, d_D, carry, similarities, d_similarities, wide_d_B, wide_d_C,
    )  # fmt: skip

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        seen = allowed(rows, spec.blocks.chunk)
        sums = jnp.where(seen, d_similarities[...], 0).astype(B.dtype)
        d_B[...] = (wide_d_B[...] + dot(sums, C[...], PLAIN)).astype(d_B.dtype)
        d_C[...] = (wide_d_C[...] + dot(sums, B[...], ROWS)).astype(d_C.dtype)

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        d_initial[...] = carry[step]


def _heads(
    spec, step, x, dt, total, B, C, D, rows, past, d_y,
    d_x, d_dt, d_total, d_D, carry, similarities, d_similarities, wide_d_B, wide_d_C,
) -> None:  # fmt: skip
    """All but B's and C's part in the similarities, which waits for the last heads of the group."""
    dtype, sizes = x.dtype, spec.blocks
    scale = scales(dt, total, rows)
    past, adjoint = past[...], carry[step]
    reads = dot(past, C[...], LANES)
    returns = dot(adjoint.astype(dtype), B[...], LANES)
    is_last = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.chunk), 1) == sizes.chunk - 1
    d_inputs, writes, d_reads, kept = [], [], [], []
    per_head = (x[...].T, d_y[...].T, reads, returns, past, adjoint)
    heads = zip(*(by_head(array, sizes) for array in per_head), strict=True)
    for h, (inputs, d_output, reads, returns, past_h, adjoint_h) in enumerate(heads):
        of_head = slice(h, h + 1)
        stepped = (wide(inputs) * scale.dt[of_head]).astype(dtype)
        output, d_stepped = _within(h, scale, stepped, d_output, similarities, d_similarities)

        inputs, stepped, d_output = wide(inputs), wide(stepped), wide(d_output)
        d_read = d_output * scale.from_past[of_head]
        write = stepped * scale.to_end[of_head]
        kept.append(adjoint_h * scale.kept[of_head])
        at_end = _sum(_sum(write * returns, 0), 1) + _sum(_sum(kept[-1] * wide(past_h), 0), 1)
        d_total_h = _sum(
            d_output * output + d_read * reads - stepped * d_stepped - write * returns, 0
        )
        d_total[of_head] = d_total_h + jnp.where(is_last, at_end, 0)
        d_stepped += returns * scale.to_end[of_head]
        d_dt[of_head] = _sum(inputs * d_stepped, 0)
        d_input = d_stepped * scale.dt[of_head]
        if D is not None:
            d_input += d_output * D[of_head]
            d_D[of_head] = _sum(d_output * inputs, 0)
        d_inputs.append(d_input.astype(dtype))
        d_reads.append(d_read.astype(dtype))
        writes.append(write.astype(dtype))
    d_reads = stack(d_reads)
    d_x[...] = stack(d_inputs).T
    carry[step] = stack(kept) + dot(d_reads, C[...], PLAIN)
    wide_d_C[...] += dot(d_reads, past, ROWS)
    wide_d_B[...] += dot(stack(writes), adjoint.astype(dtype), ROWS)


def _within(h, scale, stepped, d_output, similarities, d_similarities):
    """What the tokens of a chunk read of each other, and the gradient of `stepped` through it: float32 [P, Q] each.

    Adds to the gradient of the similarities.
    """
    count = stepped.shape[1] // TILE
    outputs, d_steppeds = [0] * count, [0] * count
    for t in range(count):
        d_output_t = d_output[:, lanes(t)]
        for s in range(t + 1):
            tile, stepped_s = (lanes(s), lanes(t)), stepped[:, lanes(s)]
            decay = scale.decay(h, s, t)
            weights = (similarities[tile] * decay).astype(stepped.dtype)
            outputs[t] += dot(stepped_s, weights, PLAIN)
            d_steppeds[s] += dot(d_output_t, weights, LANES)
            d_similarities[tile] += dot(stepped_s, d_output_t, ROWS) * decay
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(d_steppeds, axis=1)


def _sum(x, axis: int):
    return jnp.sum(x, axis=axis, keepdims=True)
