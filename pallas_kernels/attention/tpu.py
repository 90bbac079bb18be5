"""Attention for TPU (Pallas, Mosaic): the FlashAttention-2 forward.

Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1. A tile holds the queries of all heads that share a key head, so
that grouped-query attention reads each key once; arrays are as projections leave them (`lanes`). The statistics of a
row fill 128 lanes: the sum of the weights as 128 sums that are added up after the last tile, the maximum as 128 equal
numbers. So the inner loop reduces across lanes for the maximum only, and broadcasts nothing.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import lanes, tpu_backward, tpu_tile, visits
from pallas_kernels.attention.blocks import LANES, WIDEST_GROUP, blocks, width
from pallas_kernels.attention.kernels import Kernels, differentiable
from pallas_kernels.attention.mask import Mask, Tokens
from pallas_kernels.attention.tpu_tile import Spec
from pallas_kernels.dispatch import target
from pallas_kernels.pipelined import pipelined
from pallas_kernels.varying import shaped_like

LARGEST_HEAD_DIM = 512
# Products that go through the stages of the kernel together.
TOGETHER = 4
# Below any logit, and finite: the difference of two of them is 0.
LOWEST = -1e30


def refuses(q, k, v, queries, keys, *, mask, scale, logits_soft_cap) -> str | None:
    """What the kernel cannot do with these arguments, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q.dtype}; it takes bfloat16 and float32"
    head_dim = max(q.shape[3], v.shape[3])
    if head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {head_dim}; it takes up to {LARGEST_HEAD_DIM}"
    group = q.shape[2] // k.shape[2]
    largest = WIDEST_GROUP // width(head_dim, q.dtype.itemsize)
    if group > largest:
        return (
            f"{group} query heads for a key head; it takes up to {largest} of {head_dim} {q.dtype}"
        )
    return None


def attention(
    q,
    k,
    v,
    queries: Tokens,
    keys: Tokens,
    *,
    mask: Mask,
    scale,
    logits_soft_cap,
    known=None,
    interpret=False,
):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`, or `known`; see the package for the arguments.

    `interpret` is what `pallas_call` takes: True or a `pltpu.InterpretParams` to run without a TPU.
    """
    heads = lanes.heads_of(q, k, v)
    lengths = blocks(
        target().device_kind,
        num_queries=mask.num_queries,
        num_keys=mask.num_keys,
        group=heads.queries,
        head_dim=max(q.shape[3], v.shape[3]),
        itemsize=q.dtype.itemsize,
        window=mask.window,
    )
    has_tokens = mask.takes_tokens(queries)
    spec = Spec(mask, scale, logits_soft_cap, lengths, heads, has_tokens, interpret)
    _, num_queries, num_heads, _ = q.shape
    value_dim = v.shape[3]
    q = lanes.side_by_side(q, heads.keys_width // heads.sides, lengths.queries)
    k = lanes.side_by_side(k, heads.keys_width // heads.sides, lengths.keys)
    v = lanes.side_by_side(v, heads.values_width // heads.sides, lengths.keys)
    if known is not None:
        out, lse = known
        out = lanes.side_by_side(out, heads.values_width // heads.sides, lengths.queries)
        known = out, lanes.of_programs(heads, lse, lengths.queries)
    out, lse = differentiable(_KERNELS, spec, q, k, v, queries, keys, known)
    lse = lse.reshape(lse.shape[0], -1, lse.shape[3])[:, :num_heads, :num_queries]
    return lanes.apart(out, num_queries, num_heads, value_dim), lse.swapaxes(1, 2)


def _out_and_lse(spec, q, k, v, queries, keys):
    """Of arrays with heads side by side; the log-sum-exp is [B, programs, heads, Tq padded]."""
    heads = spec.heads
    batch, length, q_lanes = q.shape
    # Two sides have values as wide as keys.
    out_lanes = q_lanes * heads.values_width // heads.keys_width
    rows = (heads.queries, spec.blocks.queries, LANES)
    tiles = visits.by_queries(spec.mask, spec.blocks, spec.has_tokens)
    tokens = tpu_tile.token_arrays(spec, queries, keys)
    out, lse = tpu_tile.call(
        spec,
        functools.partial(_kernel, spec, tiles),
        tiles,
        (q, k, v, tokens),
        in_specs=(
            tpu_tile.query_block(spec, heads.keys_width),
            tpu_tile.key_block(spec, heads.keys_width),
            tpu_tile.key_block(spec, heads.values_width),
            tpu_tile.token_blocks(spec, tokens),
        ),
        out_shape=(
            shaped_like(q, (batch, length, out_lanes)),
            shaped_like(q, (batch, heads.programs, heads.queries, length), jnp.float32),
        ),
        out_specs=(tpu_tile.query_block(spec, heads.values_width), tpu_tile.row_block(spec)),
        scratch=(
            pltpu.VMEM((heads.blocks, spec.blocks.queries, heads.values_width), jnp.float32),
            pltpu.VMEM(rows, jnp.float32),
            pltpu.VMEM(rows, jnp.float32),
            *([pltpu.VMEM(rows, q.dtype)] if heads.sides > 1 else []),
        ),
        name="attention_forward",
    )
    return out, lse


_KERNELS = Kernels(_out_and_lse, tpu_backward.backward)


class _Refs(NamedTuple):
    """What the kernel reads, writes and keeps; widths of blocks are D and Dv, and `lanes` says what `placed` has."""

    query_tile: Any
    key_tile: Any
    kinds: Any
    q: Any  # [queries, blocks * D]
    k: Any  # [keys, abreast * D]
    v: Any  # [keys, abreast * Dv]
    tokens: Any
    out: Any  # [queries, blocks * Dv]
    lse: Any  # [heads, queries]
    values: Any  # [blocks, queries, Dv], as `lanes.take_queries` takes it
    totals: Any  # [heads, queries, 128]
    highest: Any
    placed: Any  # of q, if there are two sides


def _kernel(spec: Spec, tiles, *refs):
    """One visit."""
    count = len(_Refs._fields) - 1
    refs = _Refs(*refs[:count], refs[count:])
    heads, visit = spec.heads, pl.program_id(2)
    kind = refs.kinds[visit]

    @pl.when(kind & visits.FIRST != 0)
    def _():
        refs.values[...] = jnp.zeros_like(refs.values)
        refs.totals[...] = jnp.zeros_like(refs.totals)
        refs.highest[...] = jnp.full_like(refs.highest, LOWEST)
        for x in refs.placed:
            lanes.place_queries(heads, refs.q, x)

    tpu_tile.for_each_kind(
        spec, tiles, kind, "queries", functools.partial(_accumulate, spec, refs, visit)
    )

    @pl.when(kind & visits.LAST != 0)
    def _():
        @lanes.each(heads.blocks)
        def _(indices):
            (index,) = indices
            found = refs.values[index] / lanes.merged(_finish_sums(heads, refs, index))
            if refs.placed:
                refs.values[index] = found
            else:
                at = lanes.block(index, heads.values_width)
                refs.out[:, at] = found.astype(refs.out.dtype)

        if refs.placed:
            lanes.take_queries(heads, refs.values, refs.out)


def _accumulate(spec: Spec, refs: _Refs, visit, parts, sides: int, is_masked: bool) -> None:
    """Adds what the parts of a tile have to the values and the statistics."""
    heads = spec.heads
    tiles = refs.query_tile[visit], refs.key_tile[visit]

    @lanes.each(heads.blocks, spec.together(refs.q.dtype.itemsize))
    def _(indices):
        of_sides = {}

        def parts_of(item):
            number, i, side = item
            return parts[number], indices[i], heads.query_head(indices[i], side)

        def multiply(item, _):
            (queries, keys), index, head = parts_of(item)
            in_lanes = queries, lanes.block(head, heads.keys_width)
            q = refs.placed[0][head, queries] if refs.placed else refs.q[in_lanes]
            k = refs.k[keys, lanes.block(index // heads.group, heads.keys_width)]
            return tpu_tile.dot(q, lanes.only(k, 0) if sides < heads.sides else k, (1, 1))

        def weigh(item, products):
            part, _, head = parts_of(item)
            logits = tpu_tile.base2_logits(spec, products)
            if is_masked:
                mask = tpu_tile.allowed(spec, *tiles, refs.tokens, part, queries_axis=0)
                logits = jnp.where(mask, logits, -jnp.inf)
            before = refs.highest[head, part.queries]
            now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights = [jnp.exp2(x - now) for x in _lane_groups(logits)]
            rescale = jnp.exp2(before - now)
            refs.highest[head, part.queries] = now
            total = refs.totals[head, part.queries]
            refs.totals[head, part.queries] = total * rescale + sum(weights)
            return rescale, jnp.concatenate([x.astype(refs.v.dtype) for x in weights], axis=1)

        def add(item, found):
            (queries, keys), index, _ = parts_of(item)
            rescale, weights = found
            v = refs.v[keys, lanes.block(index // heads.group, heads.values_width)]
            so_far = of_sides.setdefault(item[:2], [])
            so_far.append((rescale, tpu_tile.dot(weights, v)))
            if len(so_far) == sides:
                rescale, weighted = map(lanes.merged, zip(*so_far, strict=True))
                rescale = jnp.tile(rescale, (1, heads.values_width // LANES))
                refs.values[index, queries] = refs.values[index, queries] * rescale + weighted

        counts = len(parts), len(indices), sides
        items = list(itertools.product(*map(range, counts)))
        pipelined(items, multiply, weigh, add, together=TOGETHER)


def _finish_sums(heads: lanes.Heads, refs: _Refs, index) -> list:
    """Writes the log-sum-exp of an index, and returns the sums of its weights by side, [queries, 1] each."""
    sums = []
    for side in range(heads.sides):
        head = heads.query_head(index, side)
        total = refs.totals[head].sum(axis=1, keepdims=True)
        lse = refs.highest[head] * (1 / tpu_tile.LOG2_E) + jnp.log(total)
        # A row that sees nothing has total 0: out 0, lse -inf.
        refs.lse[pl.ds(head, 1)] = tpu_tile.to_row(lse)
        sums.append(jnp.where(total == 0, 1, total))
    return sums


def _lane_groups(x):
    """[rows, n x 128] -> n x [rows, 128]."""
    return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
