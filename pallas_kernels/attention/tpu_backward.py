"""The backward of attention for TPU: one kernel for dq, dk and dv.

Dao, "FlashAttention-2", arXiv 2307.08691, section 2.3.2 and algorithm 2: the weights of a tile are recomputed from the
log-sum-exp, and d logits = weights * (d_out vᵀ - delta) with delta = d_out · out. The gradient of the log-sum-exp is
the weights themselves, so that its cotangent is subtracted from delta. Delta is worked out at the first visit to a tile
of queries.

The kernel goes along the queries of a key tile, so that dk and dv of the tile stay in VMEM, and dq of all queries does
too: five matrix products a tile, where separate kernels for dq and for dk, dv take seven. Tiles are [keys, queries],
in which the statistics of the queries broadcast along the major axis. What VMEM cannot hold of dq is cut into chunks of
queries, each with the keys that it reaches.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import lanes, tpu_tile, visits
from pallas_kernels.attention.blocks import dq_bytes
from pallas_kernels.attention.mask import Tokens
from pallas_kernels.attention.tpu_tile import VMEM_LIMIT, Spec
from pallas_kernels.pipelined import pipelined
from pallas_kernels.varying import shaped_like

# Products of k and q that go through the stages of the kernel together.
TOGETHER = 6


def backward(spec: Spec, saved, cotangents):
    """Gradients of `(q, k, v)`; see `Kernels`."""
    q, k, v, queries, keys, out, lse = saved
    d_out, d_lse = cotangents
    of_queries = (q, d_out.astype(v.dtype), out)
    rows = (lse, d_lse)
    chunk = _queries_in_vmem(spec, q)
    if chunk >= spec.mask.num_queries:
        return _gradients(spec, (of_queries, rows, queries), (k, v, keys), k.dtype)

    dq, dk, dv = [], jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for start in range(0, spec.mask.num_queries, chunk):
        stop = min(start + chunk, spec.mask.num_queries)
        at = slice(start, start + chunk)
        low, high = spec.mask.keys_of(start, stop)
        if low == high:
            dq.append(jnp.zeros_like(q[:, at]))
            continue
        low -= low % spec.blocks.keys
        tiles = slice(low, high + -high % spec.blocks.keys)
        # The last of these queries is aligned to the last of these keys, as `Mask` has it.
        mask = dataclasses.replace(spec.mask, num_queries=stop - start, num_keys=high - low)
        dq_chunk, dk_chunk, dv_chunk = _gradients(
            dataclasses.replace(spec, mask=mask),
            (
                [x[:, at] for x in of_queries],
                [x[..., at] for x in rows],
                _slice_time(queries, start, stop),
            ),
            (k[:, tiles], v[:, tiles], _slice_time(keys, low, high)),
            jnp.float32,
        )
        dq.append(dq_chunk)
        dk, dv = dk.at[:, tiles].add(dk_chunk), dv.at[:, tiles].add(dv_chunk)
    return jnp.concatenate(dq, axis=1), dk.astype(k.dtype), dv.astype(v.dtype)


def _queries_in_vmem(spec: Spec, q) -> int:
    """Queries of a chunk, a multiple of those of a tile, that leave VMEM for all else."""
    heads, blocks, itemsize = spec.heads, spec.blocks, q.dtype.itemsize
    q_lanes, out_lanes = heads.blocks * heads.keys_width, heads.blocks * heads.values_width
    key_lanes = heads.abreast * (heads.keys_width + heads.values_width)
    # Each with two buffers: q, d_out and out; k and v, and their gradients, which are in float32 if there are chunks.
    tiles = 2 * blocks.queries * (q_lanes + 2 * out_lanes) * itemsize
    tiles += 2 * blocks.keys * key_lanes * (itemsize + 4)
    scratch = heads.sides**2 * blocks.keys * key_lanes * (4 + itemsize * (heads.sides > 1))
    # What the compiler spills of logits, weights and their gradients.
    together = heads.sides * spec.together(itemsize)
    spilled = 2 * itemsize**2 * together * blocks.queries * blocks.keys
    left = VMEM_LIMIT - tiles - scratch - spilled
    return max(left // (dq_bytes(q_lanes, itemsize) * blocks.queries), 1) * blocks.queries


def _slice_time(tokens: Tokens, start: int, stop: int) -> Tokens:
    return jax.tree.map(lambda x: x[:, start:stop], tokens)


def _gradients(spec: Spec, of_queries, of_keys, dtype):
    """dq in the dtype of q, dk and dv in `dtype`; arrays have their heads side by side, and time in whole tiles."""
    (q, d_out, out), (lse, d_lse), queries = of_queries
    k, v, keys = of_keys
    heads, blocks = spec.heads, spec.blocks
    tiles = visits.by_keys(spec.mask, blocks, spec.has_tokens)
    tokens = tpu_tile.token_arrays(spec, queries, keys)
    num_tiles = q.shape[1] // blocks.queries
    widths = heads.keys_width, heads.values_width
    query_block = tpu_tile.query_block(spec, heads.keys_width)
    out_block = tpu_tile.query_block(spec, heads.values_width)
    key_blocks = [tpu_tile.key_block(spec, width) for width in widths]
    # Block, and as `lanes.place_keys` has them side and half.
    places = (heads.abreast, heads.sides, heads.sides, blocks.keys)
    return tpu_tile.call(
        spec,
        functools.partial(_kernel, spec, tiles),
        tiles,
        (q, k, v, d_out, out, lse, d_lse, tokens),
        in_specs=(
            query_block,
            *key_blocks,
            out_block,
            out_block,
            tpu_tile.row_block(spec),
            tpu_tile.row_block(spec),
            tpu_tile.token_blocks(spec, tokens),
        ),
        out_shape=(
            shaped_like(q, q.shape, q.dtype),
            shaped_like(q, k.shape, dtype),
            shaped_like(q, v.shape, dtype),
        ),
        out_specs=(
            pl.BlockSpec(
                (None, q.shape[1], heads.blocks * heads.keys_width), lambda b, h, *_: (b, 0, h)
            ),
            *key_blocks,
        ),
        scratch=(
            pltpu.VMEM((num_tiles, *query_block.block_shape[1:]), jnp.float32),
            *(pltpu.VMEM((*places, width), jnp.float32) for width in widths),
            pltpu.VMEM((num_tiles, heads.queries, blocks.queries), jnp.float32),
            *([pltpu.VMEM((*places, width), k.dtype) for width in widths] * (heads.sides > 1)),
        ),
        name="attention_backward",
    )


class _Refs(NamedTuple):
    """What the kernel reads, writes and keeps; widths of blocks are D and Dv, and `lanes` says what `placed` has."""

    query_tile: Any
    key_tile: Any
    kinds: Any
    q: Any  # [queries, blocks * D]
    k: Any  # [keys, abreast * D]
    v: Any  # [keys, abreast * Dv]
    d_out: Any  # [queries, blocks * Dv]
    out: Any
    lse: Any  # [heads, queries]
    d_lse: Any
    tokens: Any
    dq: Any  # [Tq, blocks * D]
    dk: Any
    dv: Any
    q_sums: Any  # [tiles, queries, blocks * D]
    k_sums: Any  # [abreast, sides, sides, keys, D]
    v_sums: Any
    delta: Any  # [tiles, heads, queries]
    placed: Any  # of k and v if there are two sides, each as its sums


def _kernel(spec: Spec, tiles, *refs):
    """One visit to the tile [keys, queries]."""
    count = len(_Refs._fields) - 1
    refs = _Refs(*refs[:count], refs[count:])
    heads, visit = spec.heads, pl.program_id(2)
    kind, q_sums = refs.kinds[visit], refs.q_sums

    @pl.when(visit == 0)
    def _():
        @pl.loop(0, q_sums.shape[0])
        def _(tile):
            q_sums[tile] = jnp.zeros(refs.q.shape, jnp.float32)

    @pl.when(kind & visits.FIRST != 0)
    def _():
        for sums in (refs.k_sums, refs.v_sums):
            sums[...] = jnp.zeros_like(sums)
        for x, place in zip((refs.k, refs.v), refs.placed, strict=False):
            for index in range(heads.abreast):
                lanes.place_keys(x[:, lanes.block(index, lanes.LANES)], place.at[index])

    @pl.when(kind & visits.NEW != 0)
    def _():
        _set_delta(heads, refs, refs.delta.at[refs.query_tile[visit]])

    tpu_tile.for_each_kind(
        spec, tiles, kind, "keys", functools.partial(_accumulate, spec, refs, visit)
    )

    @pl.when(kind & visits.LAST != 0)
    def _():
        for index in range(heads.abreast):
            k_sum, v_sum = (lanes.take_keys(x.at[index]) for x in (refs.k_sums, refs.v_sums))
            k_sum *= spec.scale
            refs.dk[:, lanes.block(index, heads.keys_width)] = k_sum.astype(refs.dk.dtype)
            refs.dv[:, lanes.block(index, heads.values_width)] = v_sum.astype(refs.dv.dtype)

    @pl.when(visit == pl.num_programs(2) - 1)
    def _():
        @pl.loop(0, q_sums.shape[0])
        def _(tile):
            length = spec.blocks.queries
            at = pl.ds(pl.multiple_of(tile * length, length), length)
            refs.dq[at, :] = (q_sums[tile] * spec.scale).astype(refs.dq.dtype)


def _accumulate(spec: Spec, refs: _Refs, visit, parts, sides: int, is_masked: bool) -> None:
    """Adds what the parts of a tile have to the sums."""
    heads = spec.heads
    tiles = tile, _ = refs.query_tile[visit], refs.key_tile[visit]

    def places(item):
        """The query head of an item, its block of q, and where its key head is in scratch."""
        _, index, side = item
        head = heads.query_head(index, side)
        return head, head // heads.sides, (index // heads.group, side, head % heads.sides)

    def operands(item):
        (queries, keys), *_ = item
        _, block, place = places(item)
        q_lanes, out_lanes = (
            lanes.block(block, width) for width in (heads.keys_width, heads.values_width)
        )
        if refs.placed:
            k, v = (x[*place, keys] for x in refs.placed)
        else:
            k = refs.k[keys, lanes.block(place[0], heads.keys_width)]
            v = refs.v[keys, lanes.block(place[0], heads.values_width)]
        q, d_out = refs.q[queries, q_lanes], refs.d_out[queries, out_lanes]
        if sides < heads.sides:
            q, d_out = (lanes.only(x, place[2]) for x in (q, d_out))
        return q, k, v, d_out

    def multiply(item, _):
        q, k, v, d_out = operands(item)
        return tpu_tile.dot(k, q, (1, 1)), tpu_tile.dot(v, d_out, (1, 1))

    def differentiate(item, found):
        part, *_ = item
        row = pl.ds(places(item)[0], 1)
        statistics = (x[row][:, part.queries] for x in (refs.lse, refs.delta.at[tile]))
        mask = None
        if is_masked:
            mask = tpu_tile.allowed(spec, *tiles, refs.tokens, part, queries_axis=1)
        weights, d_logits = _weights(spec, *found, *statistics, mask)
        return weights.astype(refs.v.dtype), d_logits.astype(refs.k.dtype)

    def add(item, found):
        (queries, keys), *_ = item
        weights, d_logits = found
        q, k, _, d_out = operands(item)
        _, block, place = places(item)
        refs.v_sums[*place, keys] += tpu_tile.dot(weights, d_out)
        refs.k_sums[*place, keys] += tpu_tile.dot(d_logits, q)
        at = tile, queries, lanes.block(block, heads.keys_width)
        refs.q_sums[at] += tpu_tile.dot(d_logits, k, (0, 0))

    @lanes.each(heads.blocks, spec.together(refs.q.dtype.itemsize))
    def _(indices):
        items = list(itertools.product(parts, indices, range(sides)))
        pipelined(items, multiply, differentiate, add, together=TOGETHER)


def _set_delta(heads: lanes.Heads, refs: _Refs, delta) -> None:
    """delta [heads, queries] = d_out · out - d_lse."""

    @lanes.each(heads.blocks)
    def _(indices):
        (index,) = indices
        at = lanes.block(index, heads.values_width)
        products = refs.d_out[:, at].astype(jnp.float32) * refs.out[:, at].astype(jnp.float32)
        for half, of_head in enumerate(jnp.split(products.T, heads.sides)):
            row = pl.ds(heads.sides * index + half, 1)
            found = of_head.sum(axis=0, keepdims=True) - refs.d_lse[row]
            # A row that sees nothing is masked wherever it is visited; finite numbers keep it from making NaN.
            delta[row] = jnp.where(jnp.isneginf(refs.lse[row]), 0, found)


def _weights(spec: Spec, products, d_weights, lse, delta, mask):
    """Weights of a tile, and the gradient of its logits but for the factor `scale`."""
    logits = tpu_tile.base2_logits(spec, products)
    # As in `_set_delta`.
    lse = jnp.where(jnp.isneginf(lse), 0, lse * tpu_tile.LOG2_E)
    weights = jnp.exp2(logits - lse)
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    d_logits = weights * (d_weights - delta)
    if spec.logits_soft_cap is not None:
        d_logits *= tpu_tile.soft_cap_slope(spec, logits)
    return weights, d_logits
