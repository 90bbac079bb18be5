"""The backward of attention for NVIDIA Hopper: a kernel for dq, and one for dk and dv.

Dao, "FlashAttention-2", arXiv 2307.08691, section 2.3.2 and algorithm 2: the weights of a tile are recomputed from the
log-sum-exp, and d logits = weights * (d_out vᵀ - delta) with delta = d_out · out. The gradient of the log-sum-exp is
the weights themselves, so that its cotangent is subtracted from delta.

A single kernel would take five matrix products a tile where two take seven, but its blocks would add to the same dq in
HBM, in an order that changes from run to run. Here every sum stays in the registers of one warpgroup, and a gradient
is the same each time. Tiles are [queries, keys] for dq and [keys, queries] for dk and dv: rows are what is summed for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention import gpu_tile, visits
from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.gpu_tile import BLOCK, Spec
from pallas_kernels.hopper import ROWS, WARPGROUPS

# Keys (for dq) or queries (for dk and dv) of a tile: beside the sums, registers hold two tiles of logits.
COLUMNS = 64


def backward(spec: Spec, saved, cotangents):
    """Gradients of `(q, k, v)`; see `Kernels`."""
    q, k, v, queries, keys, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    # A row that sees nothing is masked wherever it is visited; finite numbers keep it from making NaN.
    empty = jnp.isneginf(lse)
    statistics = jnp.stack(
        [jnp.where(empty, 0, lse * gpu_tile.LOG2_E), jnp.where(empty, 0, delta)], axis=2
    )
    statistics = gpu_tile.pad_time(statistics, BLOCK).transpose(0, 3, 2, 1)
    width = gpu_tile.width(q, v)
    padded = [gpu_tile.pad_heads(x, BLOCK, width) for x in (q, d_out.astype(v.dtype), k, v)]
    tokens = gpu_tile.token_arrays(spec, queries, keys, BLOCK, BLOCK)
    dq = _queries_gradient(spec, *padded, statistics, tokens)
    dk, dv = _keys_gradients(spec, *padded, statistics, tokens)
    dq, dk, dv = (
        gradient[:, : x.shape[1], :, : x.shape[3]] for gradient, x in ((dq, q), (dk, k), (dv, v))
    )
    return dq, dk, dv


def _queries_gradient(spec: Spec, q, d_out, k, v, statistics, tokens):
    """dq [B, Tq, H, D] of padded arrays; `statistics` are lse and delta, float32 [B, H, 2, Tq]."""
    batch, length, heads, width = q.shape
    table = visits.ranges(
        visits.by_queries(spec.mask, Blocks(BLOCK, COLUMNS), spec.has_tokens), axis="query"
    )
    (dq,) = hopper.call(
        functools.partial(_queries_kernel, spec),
        (table, q, d_out, k, v, statistics, *tokens),
        out=((q.shape, q.dtype),),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, width), q.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, width), d_out.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.SMEM((WARPGROUPS, ROWS, COLUMNS), k.dtype),
            gpu_tile.key_ring(k, v, tokens, COLUMNS),
        ),
        grid=gpu_tile.grid(batch, heads, length),
        interpret=spec.interpret,
        name="attention_backward_queries",
    )
    return dq


def _queries_kernel(spec: Spec, table, q, d_out, k, v, statistics, *rest):
    """A block: the queries [BLOCK, D] of a head -> dq [BLOCK, D]."""
    *tokens, dq, q_tiles, d_out_tiles, filled, d_logit_tiles, ring = rest
    batch, head, index = (jax.lax.axis_index(name) for name in gpu_tile.AXES)
    # Causal rows are the longer the later they are, and the longest begin first.
    block = table.shape[0] - 1 - index
    visited = gpu_tile.load_visited(table, block)
    warpgroup = jax.lax.axis_index("warpgroup")
    tiles = gpu_tile.start_keys(ring, visited, q, k, v, tokens, batch, head, COLUMNS)

    start = block * BLOCK + warpgroup * ROWS
    rows = pl.ds(start, ROWS)
    q_tile, d_out_tile, d_logit_tile = (
        x.at[warpgroup] for x in (q_tiles, d_out_tiles, d_logit_tiles)
    )
    plgpu.copy_gmem_to_smem(q.at[batch, rows, head], q_tile, filled.at[warpgroup])
    plgpu.copy_gmem_to_smem(d_out.at[batch, rows, head], d_out_tile, filled.at[warpgroup])
    of_rows = [hopper.load_vector(statistics.at[batch, head, i, rows], 0) for i in range(2)]
    query = start
    if tokens:
        query = gpu_tile.load_tokens(gpu_tile.of_batch(tokens[0], batch, start, ROWS), 0)
    plgpu.barrier_wait(filled.at[warpgroup])

    def accumulate(i, pieces, q_sums):
        k_tile, v_tile, *key_tokens = pieces
        tile = visited.first + i
        key = gpu_tile.load_tokens(key_tokens[0], 1) if tokens else tile * COLUMNS
        logits, d_weights = hopper.products((q_tile, k_tile.T), (d_out_tile, v_tile.T))
        _, d_logits = _weights(
            spec,
            logits,
            d_weights,
            of_rows.__getitem__,
            query,
            key,
            visited.is_full(tile),
            queries_axis=0,
        )
        hopper.stage((d_logits, d_logit_tile))
        return q_sums + hopper.product(d_logit_tile, k_tile)

    q_sums = tiles.fold(accumulate, hopper.zeros(ROWS, q.shape[3]))
    hopper.write_tile(q_sums * spec.scale, q_tile, dq.at[batch, rows, head])


def _keys_gradients(spec: Spec, q, d_out, k, v, statistics, tokens):
    """dk and dv [B, Tk, Hkv, D] of padded arrays; `statistics` are lse and delta, float32 [B, H, 2, Tq]."""
    batch, length, kv_heads, width = k.shape
    table = visits.ranges(
        visits.by_keys(spec.mask, Blocks(COLUMNS, BLOCK), spec.has_tokens), axis="key"
    )
    return hopper.call(
        functools.partial(_keys_kernel, spec),
        (table, q, d_out, k, v, statistics, *tokens),
        out=((k.shape, k.dtype), (v.shape, v.dtype)),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, width), k.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, width), v.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.SMEM((WARPGROUPS, ROWS, COLUMNS), v.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, COLUMNS), k.dtype),
            hopper.ring(
                ((COLUMNS, width), q.dtype),
                ((COLUMNS, width), d_out.dtype),
                ((2, COLUMNS), jnp.float32),
                *(((x.shape[1], COLUMNS), x.dtype) for x in tokens[:1]),
            ),
        ),
        grid=gpu_tile.grid(batch, kv_heads, length),
        interpret=spec.interpret,
        name="attention_backward_keys",
    )


def _keys_kernel(spec: Spec, table, q, d_out, k, v, statistics, *rest):
    """A block: the keys [BLOCK, D] of a head, with the queries of all heads that share it -> dk, dv [BLOCK, D]."""
    *tokens, dk, dv, k_tiles, v_tiles, filled, weight_tiles, d_logit_tiles, ring = rest
    batch, kv_head, block = (jax.lax.axis_index(name) for name in gpu_tile.AXES)
    visited = gpu_tile.load_visited(table, block)
    tiles_of_head = visited.num_tiles
    group = q.shape[2] // k.shape[2]
    num_tiles = tiles_of_head * group
    warpgroup = jax.lax.axis_index("warpgroup")

    def pieces(i):
        head = kv_head * group + jax.lax.div(i, tiles_of_head)
        start = (visited.first + jax.lax.rem(i, tiles_of_head)) * COLUMNS
        columns = pl.ds(start, COLUMNS)
        yield q.at[batch, columns, head]
        yield d_out.at[batch, columns, head]
        yield statistics.at[batch, head, :, columns]
        for x in tokens[:1]:
            yield gpu_tile.of_batch(x, batch, start, COLUMNS)

    tiles = ring.start(num_tiles, pieces)

    start = block * BLOCK + warpgroup * ROWS
    rows = pl.ds(start, ROWS)
    k_tile, v_tile, weight_tile, d_logit_tile = (
        x.at[warpgroup] for x in (k_tiles, v_tiles, weight_tiles, d_logit_tiles)
    )
    plgpu.copy_gmem_to_smem(k.at[batch, rows, kv_head], k_tile, filled.at[warpgroup])
    plgpu.copy_gmem_to_smem(v.at[batch, rows, kv_head], v_tile, filled.at[warpgroup])
    key = start
    if tokens:
        key = gpu_tile.load_tokens(gpu_tile.of_batch(tokens[1], batch, start, ROWS), 0)
    plgpu.barrier_wait(filled.at[warpgroup])

    def accumulate(i, pieces, carry):
        k_sums, v_sums = carry
        q_tile, d_out_tile, of_rows, *query_tokens = pieces
        tile = visited.first + jax.lax.rem(i, tiles_of_head)
        query = gpu_tile.load_tokens(query_tokens[0], 1) if tokens else tile * COLUMNS
        logits, d_weights = hopper.products((k_tile, q_tile.T), (v_tile, d_out_tile.T))
        weights, d_logits = _weights(
            spec,
            logits,
            d_weights,
            lambda which: hopper.load_vector(of_rows.at[which], 1),
            query,
            key,
            visited.is_full(tile),
            queries_axis=1,
        )
        # Both leave the registers before a product needs them.
        hopper.stage((weights, weight_tile), (d_logits, d_logit_tile))
        v_sums += hopper.product(weight_tile, d_out_tile)
        k_sums += hopper.product(d_logit_tile, q_tile)
        return k_sums, v_sums

    nothing = hopper.zeros(ROWS, k.shape[3])
    k_sums, v_sums = tiles.fold(accumulate, (nothing, nothing))
    hopper.write_tile(k_sums * spec.scale, k_tile, dk.at[batch, rows, kv_head])
    hopper.write_tile(v_sums, v_tile, dv.at[batch, rows, kv_head])


def _weights(spec: Spec, products, d_weights, statistic, query, key, is_full, *, queries_axis: int):
    """Weights of a tile, and the gradient of its logits but for the factor `scale`.

    `statistic(0)` are the log-sum-exps of the queries in base 2, `statistic(1)` their deltas; they are read where they
    are needed, because along the columns of a tile they fill registers.
    """
    logits = gpu_tile.base2_logits(spec, products)
    weights = jnp.exp2(logits - hopper.along(statistic(0), logits.shape, queries_axis))
    weights = gpu_tile.where_allowed(
        spec, weights, 0.0, query, key, is_full, queries_axis=queries_axis
    )
    d_logits = weights * (d_weights - hopper.along(statistic(1), logits.shape, queries_axis))
    if spec.logits_soft_cap is not None:
        d_logits *= gpu_tile.soft_cap_slope(spec, logits)
    return weights, d_logits
