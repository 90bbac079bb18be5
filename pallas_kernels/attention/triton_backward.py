"""The backward of attention in Triton: a kernel for dq, and one for dk and dv.

Dao, "FlashAttention-2", arXiv 2307.08691, section 2.3.2 and algorithm 2: the weights of a tile are recomputed from the
log-sum-exp, and d logits = weights * (d_out vᵀ - delta) with delta = d_out · out. The gradient of the log-sum-exp is
the weights themselves, so that its cotangent is subtracted from delta.

A single kernel would take five matrix products a tile where two take seven, but its programs would add to the same dq
in HBM, in an order that changes from run to run. Here every sum stays in one program, and a gradient is the same each
time. Tiles are [queries, keys] for dq and [keys, queries] for dk and dv: rows are what is summed for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.attention import triton_blocks
from pallas_kernels.attention.triton_tile import (
    FULL,
    LOG2_E,
    Spec,
    base2_logits,
    key_tiles,
    load_tokens,
    query_tiles,
    soft_cap_slope,
    tiles_of,
    token_arrays,
    where_allowed,
)
from pallas_kernels.triton_tiles import dot, load_tile, store_tile, vector_pointers


def backward(static: tuple[Spec, bool], saved, cotangents):
    """Gradients of `(q, k, v)`; see `Kernels`. `static`: as of the forward, and whether to interpret."""
    spec, interpret = static
    q, k, v, queries, keys, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    # A row that sees nothing is masked wherever it is visited; finite numbers keep it from making NaN.
    empty = jnp.isneginf(lse)
    delta = jnp.where(empty, 0, delta).swapaxes(1, 2)
    lse = jnp.where(empty, 0, lse * LOG2_E.value).swapaxes(1, 2)
    spec = dataclasses.replace(spec, blocks=triton_blocks.of(triton_blocks.BACKWARD, q, v))
    tokens = token_arrays(spec, queries, keys, q.shape[0])

    def run(kernel, programs, *outputs):
        return triton_call.call(
            kernel,
            (q, k, v, d_out, lse, delta, *tokens),
            out=[jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in outputs],
            programs=programs,
            constants={"s": spec},
            launch=spec.blocks.launch,
            interpret=interpret,
        )

    (dq,) = run(attention_backward_queries, spec.num_query_blocks * spec.q.heads, q)
    dk, dv = run(attention_backward_keys, spec.num_key_blocks * spec.k.heads, k, v)
    return dq, dk, dv


@triton.jit
def attention_backward_queries(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    q_position,
    k_position,
    q_segment,
    k_segment,
    dq,
    s: tl.constexpr,
):
    """A program: a block of queries of one head -> dq.

    Args:
        q: as `attention_forward` has it; so are k, v, the tokens and s.
        d_out: [B, Tq, H, Dv].
        lse: log-sum-exp in base 2, float32 [B, H, Tq].
        delta: float32 [B, H, Tq].
        dq: [B, Tq, H, D].
    """
    program = tl.program_id(0)
    row = program // s.num_query_blocks
    batch, head = row // s.q.heads, row % s.q.heads
    # Causal rows are the longer the later they are, and the longest begin first.
    start = (s.num_query_blocks - 1 - program % s.num_query_blocks) * s.blocks.queries
    q_tile = load_tile(q, s.q, batch, head, start, s.blocks.queries)
    d_out_tile = load_tile(d_out, s.out, batch, head, start, s.blocks.queries)
    lse_of_rows = _statistic(s, lse, row, start)
    delta_of_rows = _statistic(s, delta, row, start)
    query, query_segment = load_tokens(
        q_position, q_segment, s.q.length, s.mask.offset, batch, start, s.blocks.queries
    )
    q_sums = tl.full((s.blocks.queries, s.q.width), 0, tl.float32)
    bounds = key_tiles(s, start)
    first_phase: tl.constexpr = s.key_phases[0]
    stop_phase: tl.constexpr = s.key_phases[1]
    for phase in tl.static_range(first_phase, stop_phase):
        first, stop = tiles_of(phase, bounds)
        for tile in tl.range(first, stop):
            key_start = tile * s.blocks.keys
            k_tile = load_tile(k, s.k, batch, head // s.group, key_start, s.blocks.keys)
            v_tile = load_tile(v, s.v, batch, head // s.group, key_start, s.blocks.keys)
            logits = base2_logits(s, dot(q_tile, tl.trans(k_tile)))
            weights = tl.exp2(logits - lse_of_rows[:, None])
            if phase != FULL:
                key, key_segment = load_tokens(
                    k_position, k_segment, s.k.length, 0, batch, key_start, s.blocks.keys
                )
                weights = where_allowed(
                    s,
                    weights,
                    0.0,
                    query[:, None],
                    key[None, :],
                    query_segment[:, None],
                    key_segment[None, :],
                    q_segment is not None,
                )
            d_weights = dot(d_out_tile, tl.trans(v_tile))
            d_logits = _d_logits(s, logits, weights, d_weights - delta_of_rows[:, None])
            q_sums = dot(d_logits.to(k_tile.dtype), k_tile, q_sums)
    store_tile(dq, s.q, batch, head, start, q_sums * s.scale)


@triton.jit
def attention_backward_keys(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    q_position,
    k_position,
    q_segment,
    k_segment,
    dk,
    dv,
    s: tl.constexpr,
):
    """A program: a block of keys of one head, with the queries of all heads that share it -> dk and dv.

    Args:
        q: as `attention_backward_queries` has it; so are the others.
        dk: [B, Tk, Hkv, D].
        dv: [B, Tk, Hkv, Dv].
    """
    program = tl.program_id(0)
    row = program // s.num_key_blocks
    batch, kv_head = row // s.k.heads, row % s.k.heads
    start = (program % s.num_key_blocks) * s.blocks.keys
    k_tile = load_tile(k, s.k, batch, kv_head, start, s.blocks.keys)
    v_tile = load_tile(v, s.v, batch, kv_head, start, s.blocks.keys)
    key, key_segment = load_tokens(
        k_position, k_segment, s.k.length, 0, batch, start, s.blocks.keys
    )
    k_sums = tl.full((s.blocks.keys, s.k.width), 0, tl.float32)
    v_sums = tl.full((s.blocks.keys, s.v.width), 0, tl.float32)
    bounds = query_tiles(s, start)
    first_phase: tl.constexpr = s.query_phases[0]
    stop_phase: tl.constexpr = s.query_phases[1]
    for head in tl.range(kv_head * s.group, (kv_head + 1) * s.group):
        for phase in tl.static_range(first_phase, stop_phase):
            first, stop = tiles_of(phase, bounds)
            for tile in tl.range(first, stop):
                query_start = tile * s.blocks.queries
                q_tile = load_tile(q, s.q, batch, head, query_start, s.blocks.queries)
                d_out_tile = load_tile(d_out, s.out, batch, head, query_start, s.blocks.queries)
                # Of queries past the end d_out and delta are 0, so that nothing comes of their weights.
                statistics_row = batch * s.q.heads + head
                lse_of_columns = _statistic(s, lse, statistics_row, query_start)
                delta_of_columns = _statistic(s, delta, statistics_row, query_start)
                logits = base2_logits(s, dot(k_tile, tl.trans(q_tile)))
                weights = tl.exp2(logits - lse_of_columns[None, :])
                if phase != FULL:
                    query, query_segment = load_tokens(
                        q_position,
                        q_segment,
                        s.q.length,
                        s.mask.offset,
                        batch,
                        query_start,
                        s.blocks.queries,
                    )
                    weights = where_allowed(
                        s,
                        weights,
                        0.0,
                        query[None, :],
                        key[:, None],
                        query_segment[None, :],
                        key_segment[:, None],
                        q_segment is not None,
                    )
                v_sums = dot(weights.to(d_out_tile.dtype), d_out_tile, v_sums)
                d_weights = dot(v_tile, tl.trans(d_out_tile))
                d_logits = _d_logits(s, logits, weights, d_weights - delta_of_columns[None, :])
                k_sums = dot(d_logits.to(q_tile.dtype), q_tile, k_sums)
    store_tile(dk, s.k, batch, kv_head, start, k_sums * s.scale)
    store_tile(dv, s.v, batch, kv_head, start, v_sums)


@triton.jit
def _statistic(s: tl.constexpr, x, row, start):
    """Entries of lse or delta for a block of queries, 0 past the end."""
    pointers, exists = vector_pointers(x, s.q.length, row, start, s.blocks.queries)
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def _d_logits(s: tl.constexpr, logits, weights, d_weights):
    """The gradient of the logits but for the factor `scale`; `d_weights` less delta."""
    d_logits = weights * d_weights
    if s.soft_cap is not None:
        d_logits *= soft_cap_slope(s, logits)
    return d_logits
