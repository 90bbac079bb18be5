"""Attention for TPU (Pallas, Mosaic): FlashAttention-2 forward, and the custom VJP around it and the backward.

Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1. A tile holds the queries of all heads that share a key head, so
that grouped-query attention reads each key once. The statistics of a row fill 128 lanes: the sum of the weights as 128
sums that are added up after the last tile, the maximum as 128 equal numbers. So the inner loop reduces across lanes for
the maximum only, and broadcasts nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_backward, tpu_tile, visits
from pallas_kernels.attention.blocks import LANES, WIDEST_GROUP, blocks, width
from pallas_kernels.attention.mask import Mask, Tokens
from pallas_kernels.attention.tpu_tile import Spec
from pallas_kernels.dispatch import target
from pallas_kernels.residuals import keep
from pallas_kernels.varying import shaped_like, vary_alike

LARGEST_HEAD_DIM = 512
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
    interpret=False,
):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`; see the package for the arguments.

    `interpret` is what `pallas_call` takes: True or a `pltpu.InterpretParams` to run without a TPU.
    """
    lengths = blocks(
        target().device_kind,
        num_queries=mask.num_queries,
        num_keys=mask.num_keys,
        group=q.shape[2] // k.shape[2],
        head_dim=max(q.shape[3], v.shape[3]),
        itemsize=q.dtype.itemsize,
        window=mask.window,
    )
    has_tokens = mask.takes_tokens(queries)
    spec = Spec(mask, scale, logits_soft_cap, lengths, has_tokens, interpret)
    return _attention(spec, *vary_alike((q, k, v, queries, keys)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, queries, keys):
    return _forward(spec, q, k, v, queries, keys)[0]


def _forward(spec, q, k, v, queries, keys):
    heads = tpu_tile.heads_of_queries(spec, q, k.shape[2])
    group, value_dim = heads.shape[3], v.shape[3]
    tokens = tpu_tile.token_arrays(spec, queries, keys)
    rows = (group, spec.blocks.queries)
    out, lse = tpu_tile.call(
        spec,
        functools.partial(_kernel, spec),
        visits.by_queries(spec.mask, spec.blocks, spec.has_tokens),
        (heads, tpu_tile.heads_of_keys(spec, k), tpu_tile.heads_of_keys(spec, v), tokens),
        in_specs=(
            tpu_tile.query_block(spec, group, q.shape[3]),
            tpu_tile.key_block(spec, q.shape[3]),
            tpu_tile.key_block(spec, value_dim),
            tpu_tile.token_blocks(spec, tokens),
        ),
        out_shape=(
            shaped_like(q, (*heads.shape[:5], value_dim), v.dtype),
            shaped_like(q, heads.shape[:5], jnp.float32),
        ),
        out_specs=(
            tpu_tile.query_block(spec, group, value_dim),
            tpu_tile.query_block(spec, group),
        ),
        scratch=(
            pltpu.VMEM((*rows, value_dim), jnp.float32),
            pltpu.VMEM((*rows, LANES), jnp.float32),
            pltpu.VMEM((*rows, LANES), jnp.float32),
        ),
        name="attention_forward",
    )
    out, lse = (tpu_tile.from_heads_of_queries(spec, x) for x in (out, lse))
    out, lse = keep(out, lse)
    return (out, lse), (q, k, v, queries, keys, out, lse)


_attention.defvjp(_forward, tpu_backward.backward)


def _kernel(spec: Spec, *refs):
    """One visit: q [G, queries, D], k [keys, D], v [keys, Dv] -> out [G, queries, Dv], lse [G, queries]."""
    query_tile, key_tile, kinds, q, k, v, tokens, out, lse, values, totals, highest = refs
    visit = pl.program_id(2)
    kind = kinds[visit]

    @pl.when(kind & visits.FIRST != 0)
    def _():
        values[...] = jnp.zeros_like(values)
        totals[...] = jnp.zeros_like(totals)
        highest[...] = jnp.full_like(highest, LOWEST)

    def accumulate(make_mask):
        # Unrolled, this would be 4 % faster and take the compiler a time that grows with the group.
        @pl.loop(0, q.shape[0])
        def _(head):
            logits = tpu_tile.base2_logits(spec, tpu_tile.dot(q[head], k[...], (1, 1)))
            if make_mask is not None:
                logits = jnp.where(make_mask(), logits, -jnp.inf)
            before = highest[head]
            now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights = [jnp.exp2(x - now) for x in _lane_groups(logits)]
            rescale = jnp.exp2(before - now)
            highest[head] = now
            totals[head] = totals[head] * rescale + sum(weights)
            weights = jnp.concatenate([x.astype(v.dtype) for x in weights], axis=1)
            weighted = tpu_tile.dot(weights, v[...])
            values[head] = values[head] * _widened(rescale, v.shape[1]) + weighted

    tpu_tile.when_visited(
        spec,
        kind,
        lambda: tpu_tile.allowed(spec, query_tile[visit], key_tile[visit], tokens, queries_axis=0),
        accumulate,
    )

    @pl.when(kind & visits.LAST != 0)
    def _():
        @pl.loop(0, q.shape[0])
        def _(head):
            total = totals[head].sum(axis=1, keepdims=True)
            # A row that sees nothing has total 0: out 0, lse -inf.
            out[head] = (values[head] / jnp.where(total == 0, 1, total)).astype(out.dtype)
            lse[pl.ds(head, 1)] = tpu_tile.to_row(
                highest[head] * (1 / tpu_tile.LOG2_E) + jnp.log(total)
            )


def _lane_groups(x):
    """[rows, n x 128] -> n x [rows, 128]."""
    return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]


def _widened(x, width: int):
    """[rows, 128], whose lanes are equal, -> [rows, width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]
