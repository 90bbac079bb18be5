"""The backward of attention for TPU: one kernel for dq, dk and dv.

Dao, "FlashAttention-2", arXiv 2307.08691, section 2.3.2 and algorithm 2: the weights of a tile are recomputed from the
log-sum-exp, and d logits = weights * (d_out vᵀ - delta) with delta = d_out · out. The gradient of the log-sum-exp is
the weights themselves, so that its cotangent is subtracted from delta.

The kernel goes along the queries of a key tile, so that dk and dv of the tile stay in VMEM, and dq of all queries does
too: five matrix products a tile, where separate kernels for dq and for dk, dv take seven. Tiles are [keys, queries],
in which the statistics of the queries broadcast along the major axis. What VMEM cannot hold of dq is cut into chunks of
queries, each with the keys that it reaches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_tile, visits
from pallas_kernels.attention.blocks import LANES
from pallas_kernels.attention.tpu_tile import Spec
from pallas_kernels.varying import shaped_like

# VMEM for dq, of which there is one sum in float32 and two buffers of the output.
DQ_BYTES = 8 * 2**20


def backward(spec: Spec, saved, cotangents):
    """Gradients of `(q, k, v, queries, keys)`; the rule of the custom VJP in `tpu.py`."""
    q, k, v, queries, keys, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    # A row that sees nothing is masked wherever it is visited; finite numbers keep it from making NaN.
    empty = jnp.isneginf(lse)
    lse = jnp.where(empty, 0, lse * tpu_tile.LOG2_E)
    of_queries = (q, d_out.astype(v.dtype), lse, jnp.where(empty, 0, delta), queries)
    chunk = _queries_in_vmem(spec, q, k)
    if chunk >= spec.mask.num_queries:
        return *_gradients(spec, of_queries, (k, v, keys), k.dtype), None, None

    dq, dk, dv = [], jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for start in range(0, spec.mask.num_queries, chunk):
        stop = min(start + chunk, spec.mask.num_queries)
        low, high = spec.mask.keys_of(start, stop)
        if low == high:
            dq.append(jnp.zeros_like(q[:, start:stop]))
            continue
        # The last of these queries is aligned to the last of these keys, as `Mask` has it.
        mask = dataclasses.replace(spec.mask, num_queries=stop - start, num_keys=high - low)
        chunk_spec = dataclasses.replace(spec, mask=mask)
        dq_chunk, dk_chunk, dv_chunk = _gradients(
            chunk_spec,
            _slice_time(of_queries, start, stop),
            _slice_time((k, v, keys), low, high),
            jnp.float32,
        )
        dq.append(dq_chunk)
        dk, dv = dk.at[:, low:high].add(dk_chunk), dv.at[:, low:high].add(dv_chunk)
    return jnp.concatenate(dq, axis=1), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _queries_in_vmem(spec: Spec, q, k) -> int:
    """Queries of a chunk, a multiple of those of a tile."""
    width = -(-q.shape[3] // LANES) * LANES
    per_query = q.shape[2] // k.shape[2] * width * (4 + 2 * q.dtype.itemsize)
    return max(DQ_BYTES // (per_query * spec.blocks.queries), 1) * spec.blocks.queries


def _slice_time(arrays, start: int, stop: int):
    return jax.tree.map(lambda x: x[:, start:stop], arrays)


def _gradients(spec: Spec, of_queries, of_keys, dtype):
    """dq [B, Tq, H, D] in its own dtype, dk [B, Tk, Hkv, D] and dv [B, Tk, Hkv, Dv] in `dtype`."""
    *of_queries, queries = of_queries
    k, v, keys = of_keys
    q, d_out, lse, delta = (tpu_tile.heads_of_queries(spec, x, k.shape[2]) for x in of_queries)
    k, v = (tpu_tile.heads_of_keys(spec, x) for x in (k, v))
    tokens = tpu_tile.token_arrays(spec, queries, keys)
    _, group, _, dim = q.shape[2:]
    value_dim = v.shape[3]
    dq, dk, dv = tpu_tile.call(
        spec,
        functools.partial(_kernel, spec),
        visits.by_keys(spec.mask, spec.blocks, spec.has_tokens),
        (q, k, v, d_out, lse, delta, tokens),
        in_specs=(
            tpu_tile.query_block(spec, group, dim),
            tpu_tile.key_block(spec, dim),
            tpu_tile.key_block(spec, value_dim),
            tpu_tile.query_block(spec, group, value_dim),
            tpu_tile.query_block(spec, group),
            tpu_tile.query_block(spec, group),
            tpu_tile.token_blocks(spec, tokens),
        ),
        out_shape=(
            shaped_like(q, q.shape, q.dtype),
            shaped_like(q, k.shape, dtype),
            shaped_like(q, v.shape, dtype),
        ),
        out_specs=(
            pl.BlockSpec((None, None, *q.shape[2:]), lambda b, h, *_: (b, h, 0, 0, 0, 0)),
            tpu_tile.key_block(spec, dim),
            tpu_tile.key_block(spec, value_dim),
        ),
        scratch=(
            pltpu.VMEM(q.shape[2:], jnp.float32),
            pltpu.VMEM((spec.blocks.keys, dim), jnp.float32),
            pltpu.VMEM((spec.blocks.keys, value_dim), jnp.float32),
        ),
        name="attention_backward",
    )
    return (
        tpu_tile.from_heads_of_queries(spec, dq),
        tpu_tile.from_heads_of_keys(spec, dk),
        tpu_tile.from_heads_of_keys(spec, dv),
    )


def _kernel(spec: Spec, *refs):
    """One visit to the tile [keys, queries]; dq [tiles, G, queries, D], dk [keys, D], dv [keys, Dv]."""
    query_tile, key_tile, kinds, q, k, v, d_out, lse, delta, tokens = refs[:10]
    dq, dk, dv, q_sums, k_sums, v_sums = refs[10:]
    visit = pl.program_id(2)
    kind = kinds[visit]

    @pl.when(visit == 0)
    def _():
        @pl.loop(0, q_sums.shape[0])
        def _(tile):
            q_sums[tile] = jnp.zeros(q.shape, jnp.float32)

    @pl.when(kind & visits.FIRST != 0)
    def _():
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    def accumulate(make_mask):
        @pl.loop(0, q.shape[0])
        def _(head):
            row = pl.ds(head, 1)
            products = tpu_tile.dot(k[...], q[head], (1, 1))
            d_weights = tpu_tile.dot(v[...], d_out[head], (1, 1))
            mask = None if make_mask is None else make_mask()
            weights, d_logits = _weights(spec, products, d_weights, lse[row], delta[row], mask)
            d_logits = d_logits.astype(k.dtype)
            v_sums[...] += tpu_tile.dot(weights.astype(v.dtype), d_out[head])
            k_sums[...] += tpu_tile.dot(d_logits, q[head])
            q_sums[query_tile[visit], head] += tpu_tile.dot(d_logits, k[...], (0, 0))

    tpu_tile.when_visited(
        spec,
        kind,
        lambda: tpu_tile.allowed(spec, query_tile[visit], key_tile[visit], tokens, queries_axis=1),
        accumulate,
    )

    @pl.when(kind & visits.LAST != 0)
    def _():
        dk[...] = (k_sums[...] * spec.scale).astype(dk.dtype)
        dv[...] = v_sums[...].astype(dv.dtype)

    @pl.when(visit == pl.num_programs(2) - 1)
    def _():
        @pl.loop(0, q_sums.shape[0])
        def _(tile):
            dq[tile] = (q_sums[tile] * spec.scale).astype(dq.dtype)


def _weights(spec: Spec, products, d_weights, lse, delta, mask):
    """Weights of a tile, and the gradient of its logits but for the factor `scale`."""
    logits = tpu_tile.base2_logits(spec, products)
    weights = jnp.exp2(logits - lse)
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    d_logits = weights * (d_weights - delta)
    if spec.logits_soft_cap is not None:
        d_logits *= tpu_tile.soft_cap_slope(spec, logits)
    return weights, d_logits
