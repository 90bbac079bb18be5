"""The forward of the state-space-duality scan on TPU, one chunk of a few heads: arXiv 2405.21060, section 6.

With S the state before the chunk, total the sum of dt A up to a token and Q the last token:

    y_t = Σ_{s<=t} (C_t · B_s) exp(total_t - total_s) dt_s x_s + exp(total_t) S C_t + D x_t
    S'  = exp(total_Q) S + Σ_s exp(total_Q - total_s) dt_s x_s B_sᵀ
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ssd_scan.tpu_blocks import TILE
from pallas_kernels.ssd_scan.tpu_chunk import (
    LANES,
    PLAIN,
    Spec,
    by_head,
    dot,
    lanes,
    scales,
    similarity,
    stack,
    wide,
)


def kernel(
    spec: Spec, x, dt, total, B, C, D, rows, initial, y, last, past, carry, similarities
) -> None:
    """The grid is batch x groups x chunks x steps of heads: a group's heads share the products C_t · B_s.

    Args:
        spec: static arguments.
        x: ref [Q, heads * P].
        dt: ref float32 [heads, Q].
        total: ref float32 [heads, Q], `tpu_chunk.Scales.total`.
        B: ref [Q, N].
        C: ref [Q, N].
        D: ref float32 [heads, Q], a row of one number a head; None: 0.
        rows: ref float32 [4, Q], `tpu.segment_rows`; None: one segment.
        initial: ref float32 [heads * P, N], the state before the first chunk.
        y: ref [Q, heads * P].
        last: ref float32 [heads * P, N], the state after the last chunk.
        past: ref [heads * P, N], the state before this chunk; None: not wanted.
        carry: scratch float32 [steps, heads * P, N].
        similarities: scratch float32 [Q, Q].
    """
    chunk, step = pl.program_id(2), pl.program_id(3)

    @pl.when(chunk == 0)
    def _():
        carry[step] = initial[...]

    @pl.when(step == 0)
    def _():
        similarities[...] = similarity(B, C, rows)

    dtype = x.dtype
    scale = scales(dt, total, rows)
    state = carry[step]
    if past is not None:
        past[...] = state.astype(past.dtype)
    inputs = by_head(x[...].T, spec.blocks)
    reads = by_head(dot(state.astype(dtype), C[...], LANES), spec.blocks)
    outputs, writes, kept = [], [], []
    for h, (inputs_h, reads_h, state_h) in enumerate(
        zip(inputs, reads, by_head(state, spec.blocks), strict=True)
    ):
        of_head = slice(h, h + 1)
        stepped = wide(inputs_h) * scale.dt[of_head]
        output = reads_h * scale.from_past[of_head] + _within(
            h, scale, stepped.astype(dtype), similarities
        )
        if D is not None:
            output += wide(inputs_h) * D[of_head]
        outputs.append(output.astype(dtype))
        writes.append((stepped * scale.to_end[of_head]).astype(dtype))
        kept.append(state_h * scale.kept[of_head])
    y[...] = stack(outputs).T
    carry[step] = stack(kept) + dot(stack(writes), B[...], PLAIN)

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _():
        last[...] = carry[step]


def _within(h, scale, stepped, similarities):
    """What the tokens of a chunk read of each other, float32 like `stepped` [P, Q]."""
    outputs = []
    for t in range(stepped.shape[1] // TILE):
        output = 0
        for s in range(t + 1):
            weights = similarities[lanes(s), lanes(t)] * scale.decay(h, s, t)
            output += dot(stepped[:, lanes(s)], weights.astype(stepped.dtype), PLAIN)
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1)
