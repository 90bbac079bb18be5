"""The backward of attention for NVIDIA Hopper: a kernel for dq, and one for dk and dv.

Dao, "FlashAttention-2", arXiv 2307.08691, section 2.3.2 and algorithm 2: the weights of a tile are recomputed from the
log-sum-exp, and d logits = weights * (d_out vᵀ - delta) with delta = d_out · out. The gradient of the log-sum-exp is
the weights themselves, so that its cotangent is subtracted from delta.

A single kernel would take five matrix products a tile where two take seven, but its blocks would add to the same dq in
HBM, in an order that changes from run to run. Here every sum stays in the registers of one warpgroup, and a gradient
is the same each time. Tiles are [queries, keys] for dq and [keys, queries] for dk and dv: rows are what is summed for.
Of the products of a tile, each is begun before the registers are done with what the one before it gave.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention import gpu_tile, visits
from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.gpu_tile import BLOCK, LARGEST_HEAD_DIM, Spec
from pallas_kernels.hopper import ROWS, WARPGROUPS

# Queries of a tile for dk and dv: beside their sums, registers hold two tiles of logits.
QUERIES = 64


def _keys(width: int) -> int:
    """Keys of a tile for dq, whose sums leave room for larger tiles the narrower a head is."""
    return QUERIES * LARGEST_HEAD_DIM // width


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
        visits.by_queries(spec.mask, Blocks(BLOCK, _keys(width)), spec.has_tokens), axis="query"
    )
    (dq,) = hopper.call(
        functools.partial(_queries_kernel, spec),
        (table, q, d_out, k, v, statistics, *tokens),
        out=((q.shape, q.dtype),),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, width), q.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, width), d_out.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            gpu_tile.key_ring(k, v, tokens, _keys(width)),
        ),
        grid=gpu_tile.grid(batch, heads, length),
        interpret=spec.interpret,
        name="attention_backward_queries",
    )
    return dq


def _queries_kernel(spec: Spec, table, q, d_out, k, v, statistics, *rest):
    """A block: the queries [BLOCK, D] of a head -> dq [BLOCK, D]."""
    *tokens, dq, q_tiles, d_out_tiles, filled, ring = rest
    batch, head, index = (jax.lax.axis_index(name) for name in gpu_tile.AXES)
    # Causal rows are the longer the later they are, and the longest begin first.
    block = table.shape[0] - 1 - index
    visited = gpu_tile.load_visited(table, block)
    warpgroup = jax.lax.axis_index("warpgroup")
    length = _keys(k.shape[3])
    tiles = gpu_tile.start_keys(ring, visited, q, k, v, tokens, batch, head, length)

    start = block * BLOCK + warpgroup * ROWS
    rows = pl.ds(start, ROWS)
    q_tile, d_out_tile = (x.at[warpgroup] for x in (q_tiles, d_out_tiles))
    plgpu.copy_gmem_to_smem(q.at[batch, rows, head], q_tile, filled.at[warpgroup])
    plgpu.copy_gmem_to_smem(d_out.at[batch, rows, head], d_out_tile, filled.at[warpgroup])
    lse, delta = (hopper.load_vector(statistics.at[batch, head, i, rows], 0) for i in range(2))
    query = start
    if tokens:
        query = gpu_tile.load_tokens(gpu_tile.of_batch(tokens[0], batch, start, ROWS), 0)
    plgpu.barrier_wait(filled.at[warpgroup])

    def accumulate(i, pieces, q_sums):
        k_tile, v_tile, *key_tokens = pieces
        tile = visited.first + i
        key = gpu_tile.load_tokens(key_tokens[0], 1) if tokens else tile * length
        where = query, key, visited.is_full(tile)

        def differentiate(products, d_weights):
            products = _begin(products, (q_tile, k_tile.T), d_weights, (d_out_tile, v_tile.T))
            logits, weights = _weights(spec, products, lse, where, queries_axis=0)
            return _logits_gradient(spec, logits, weights, d_weights[...], delta, queries_axis=0)

        sums = plgpu.ACC((ROWS, length), jnp.float32)
        d_logits = pl.run_scoped(differentiate, sums, sums)
        return hopper.add_product(q_sums, d_logits, k_tile, spec.interpret)

    q_sums = tiles.fold(accumulate, hopper.zeros(ROWS, q.shape[3]))
    hopper.write_tile(q_sums * spec.scale, q_tile, dq.at[batch, rows, head])


def _keys_gradients(spec: Spec, q, d_out, k, v, statistics, tokens):
    """dk and dv [B, Tk, Hkv, D] of padded arrays; `statistics` are lse and delta, float32 [B, H, 2, Tq]."""
    batch, length, kv_heads, width = k.shape
    table = visits.ranges(
        visits.by_keys(spec.mask, Blocks(QUERIES, BLOCK), spec.has_tokens), axis="key"
    )
    return hopper.call(
        functools.partial(_keys_kernel, spec),
        (table, q, d_out, k, v, statistics, *tokens),
        out=((k.shape, k.dtype), (v.shape, v.dtype)),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, width), k.dtype),
            plgpu.SMEM((WARPGROUPS, ROWS, width), v.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            hopper.ring(
                ((QUERIES, width), q.dtype),
                ((QUERIES, width), d_out.dtype),
                ((2, QUERIES), jnp.float32),
                *(((x.shape[1], QUERIES), x.dtype) for x in tokens[:1]),
                stages=gpu_tile.stages(width, QUERIES),
            ),
        ),
        grid=gpu_tile.grid(batch, kv_heads, length),
        interpret=spec.interpret,
        name="attention_backward_keys",
    )


def _keys_kernel(spec: Spec, table, q, d_out, k, v, statistics, *rest):
    """A block: the keys [BLOCK, D] of a head, with the queries of all heads that share it -> dk, dv [BLOCK, D]."""
    *tokens, dk, dv, k_tiles, v_tiles, filled, ring = rest
    batch, kv_head, block = (jax.lax.axis_index(name) for name in gpu_tile.AXES)
    visited = gpu_tile.load_visited(table, block)
    tiles_of_head = visited.num_tiles
    group = q.shape[2] // k.shape[2]
    num_tiles = tiles_of_head * group
    warpgroup = jax.lax.axis_index("warpgroup")

    def pieces(i):
        head = kv_head * group + jax.lax.div(i, tiles_of_head)
        start = (visited.first + jax.lax.rem(i, tiles_of_head)) * QUERIES
        columns = pl.ds(start, QUERIES)
        yield q.at[batch, columns, head]
        yield d_out.at[batch, columns, head]
        yield statistics.at[batch, head, :, columns]
        for x in tokens[:1]:
            yield gpu_tile.of_batch(x, batch, start, QUERIES)

    tiles = ring.start(num_tiles, pieces)

    start = block * BLOCK + warpgroup * ROWS
    rows = pl.ds(start, ROWS)
    k_tile, v_tile = (x.at[warpgroup] for x in (k_tiles, v_tiles))
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
        query = gpu_tile.load_tokens(query_tokens[0], 1) if tokens else tile * QUERIES
        where = query, key, visited.is_full(tile)

        def add(products, d_weights):
            products = _begin(products, (k_tile, q_tile.T), d_weights, (v_tile, d_out_tile.T))
            lse = hopper.load_vector(of_rows.at[0], 1)
            logits, weights = _weights(spec, products, lse, where, queries_axis=1)

            def of_values():
                return weights, d_out_tile

            def of_keys():
                d_w = plgpu.wgmma_accumulator_load(d_weights, wait_n=1)
                delta = hopper.load_vector(of_rows.at[1], 1)
                return _logits_gradient(spec, logits, weights, d_w, delta, queries_axis=1), q_tile

            return hopper.add_products((v_sums, k_sums), (of_values, of_keys), spec.interpret)

        sums = plgpu.ACC((ROWS, QUERIES), jnp.float32)
        v_sums, k_sums = pl.run_scoped(add, sums, sums)
        return k_sums, v_sums

    nothing = hopper.zeros(ROWS, k.shape[3])
    k_sums, v_sums = tiles.fold(accumulate, (nothing, nothing))
    hopper.write_tile(k_sums * spec.scale, k_tile, dk.at[batch, rows, kv_head])
    hopper.write_tile(v_sums, v_tile, dv.at[batch, rows, kv_head])


def _begin(first_sums, first, second_sums, second):
    """Begins two products x · y, of pairs (x, y), and reads the first while the tensor cores are at the second."""
    plgpu.wgmma(first_sums, *first)
    plgpu.wgmma(second_sums, *second)
    return plgpu.wgmma_accumulator_load(first_sums, wait_n=1)


def _weights(spec: Spec, products, lse, where, *, queries_axis: int):
    """A tile's logits and weights, logits in base 2.

    Args:
        spec: the specification.
        products: q · k, or k · q.
        lse: log-sum-exps of the queries in base 2. Along the columns of a tile, vectors fill registers: they are read
            where they are needed.
        where: `(query, key, is_full)` as `gpu_tile.where_allowed` takes them.
        queries_axis: likewise.
    """
    logits = gpu_tile.base2_logits(spec, products)
    weights = jnp.exp2(logits - hopper.along(lse, logits.shape, queries_axis))
    return logits, gpu_tile.where_allowed(spec, weights, 0.0, *where, queries_axis=queries_axis)


def _logits_gradient(spec: Spec, logits, weights, d_weights, delta, *, queries_axis: int):
    """The gradient of a tile's logits but for the factor `scale`."""
    d_logits = weights * (d_weights - hopper.along(delta, logits.shape, queries_axis))
    if spec.logits_soft_cap is not None:
        d_logits *= gpu_tile.soft_cap_slope(spec, logits)
    return d_logits
