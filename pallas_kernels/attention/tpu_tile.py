"""What the forward and backward TPU kernels share: the static specification, layouts in HBM, and one tile of logits.

Inside, q is [B, Hkv, tiles, G, queries, D]: contiguous are the queries of a tile, of all G heads that share a key head.
k is [B, Hkv, Tk, D], and the statistics of the queries are [B, Hkv, tiles, G, queries]. Time is padded to whole tiles.
Logits are in base 2, whose exponential the hardware has.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import visits
from pallas_kernels.attention.blocks import LANES, Blocks
from pallas_kernels.attention.mask import PADDING, Mask, Tokens, token_rows

LOG2_E = math.log2(math.e)
# The kernels stay below this; it is also the default limit of the smallest chip.
VMEM_LIMIT = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static arguments of the kernels.

    Attributes:
        mask: static part of the mask.
        scale: factor on the logits.
        logits_soft_cap: c of c tanh(logits / c), or None.
        blocks: lengths of the tiles.
        has_tokens: positions or segments come as arrays; else position is index.
        interpret: what `pallas_call` takes.
    """

    mask: Mask
    scale: float
    logits_soft_cap: float | None
    blocks: Blocks
    has_tokens: bool
    interpret: Any


# One tile.


def dot(x, y, contract=(1, 0)):
    """x · y over axis `contract[0]` of x and `contract[1]` of y, accumulated in float32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=exact, preferred_element_type=jnp.float32
    )


def base2_logits(spec: Spec, products):
    """Products q · k -> logits times log2(e), soft cap included."""
    if spec.logits_soft_cap is None:
        return products * (spec.scale * LOG2_E)
    cap = spec.logits_soft_cap
    return (cap * LOG2_E) * jnp.tanh(products * (spec.scale / cap))


def soft_cap_slope(spec: Spec, logits):
    """d capped / d uncapped = 1 - tanh², from the capped base-2 logits."""
    return 1 - jnp.square(logits * (1 / (spec.logits_soft_cap * LOG2_E)))


def allowed(spec: Spec, query_tile, key_tile, tokens, *, queries_axis: int):
    """Which logits of a tile count.

    Args:
        spec: the specification.
        query_tile: index of the tile along the queries.
        key_tile: along the keys.
        tokens: None, or the pair of blocks int32 [1 or 2, block] of the queries and of the keys.
        queries_axis: 0 for a tile [queries, keys], 1 for [keys, queries].
    """
    blocks = spec.blocks
    if tokens is None:
        query_shape, key_shape = [1, 1], [1, 1]
        query_shape[queries_axis], key_shape[1 - queries_axis] = blocks.queries, blocks.keys
        query = jax.lax.broadcasted_iota(jnp.int32, query_shape, queries_axis)
        key = jax.lax.broadcasted_iota(jnp.int32, key_shape, 1 - queries_axis)
        key += key_tile * blocks.keys
        if spec.mask.num_keys % blocks.keys:
            key = jnp.where(key < spec.mask.num_keys, key, PADDING)
        queries = Tokens(query + (query_tile * blocks.queries + spec.mask.offset), None)
        keys = Tokens(key, None)
    else:
        queries, keys = (
            Tokens(*(_along(x[i : i + 1], axis) for i in range(len(x))), *[None] * (2 - len(x)))
            for x, axis in zip(tokens, (queries_axis, 1 - queries_axis), strict=True)
        )
    return spec.mask.allowed(queries, keys)


def when_visited(spec: Spec, kind, make_mask, accumulate) -> None:
    """Calls `accumulate` with what makes the mask of the tile, or with None where all logits count."""

    @pl.when(kind & visits.MASKED != 0)
    def _():
        accumulate(make_mask)

    if not spec.has_tokens:

        @pl.when(kind & (visits.MASKED | visits.EMPTY) == 0)
        def _():
            accumulate(None)


def _along(row, axis: int):
    return row if axis == 1 else to_column(row)


def to_column(row):
    """[1, n] -> [n, 1]; n is a multiple of 128."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def to_row(column):
    """[n, 1] -> [1, n]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


# Layouts in HBM.


def heads_of_queries(spec: Spec, x, kv_heads: int):
    """[B, Tq, H, ...] -> [B, Hkv, tiles, G, queries, ...]."""
    x = _pad(x, 1, spec.blocks.queries)
    batch, _, heads, *rest = x.shape
    x = x.reshape(batch, -1, spec.blocks.queries, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(x, (3, 1, 4, 2), (1, 2, 3, 4))


def from_heads_of_queries(spec: Spec, x):
    """[B, Hkv, tiles, G, queries, ...] -> [B, Tq, H, ...]."""
    batch, kv_heads, tiles, group, queries, *rest = x.shape
    x = jnp.moveaxis(x, (1, 2, 3, 4), (3, 1, 4, 2))
    return x.reshape(batch, tiles * queries, kv_heads * group, *rest)[:, : spec.mask.num_queries]


def heads_of_keys(spec: Spec, x):
    """[B, Tk, Hkv, D] -> [B, Hkv, Tk padded, D]."""
    return _pad(x, 1, spec.blocks.keys).swapaxes(1, 2)


def from_heads_of_keys(spec: Spec, x):
    """[B, Hkv, Tk padded, D] -> [B, Tk, Hkv, D]."""
    return x.swapaxes(1, 2)[:, : spec.mask.num_keys]


def token_arrays(spec: Spec, queries: Tokens, keys: Tokens):
    """Positions and segments, if any, of queries and of keys as two int32 [B, 1 or 2, T padded]; None if not needed."""
    if not spec.has_tokens:
        return None
    # A padded query has the position of no query, so that in the order of index it sees nothing that counts.
    return (
        token_rows(queries, spec.blocks.queries, 0),
        token_rows(keys, spec.blocks.keys, PADDING),
    )


def _pad(x, axis: int, block: int):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, padding)


# The call.


def query_block(spec: Spec, group: int, dim: int | None = None) -> pl.BlockSpec:
    """The tile [G, queries, dim] of q, or [G, queries] of a statistic, that a visit reads or writes."""
    shape = (group, spec.blocks.queries) if dim is None else (group, spec.blocks.queries, dim)
    return pl.BlockSpec(
        (None, None, None, *shape),
        lambda b, h, i, query, key, kind: (b, h, query[i], *[0] * len(shape)),
    )


def key_block(spec: Spec, dim: int) -> pl.BlockSpec:
    """The tile [keys, dim] of k or v that a visit reads or writes."""
    shape = (None, None, spec.blocks.keys, dim)
    return pl.BlockSpec(shape, lambda b, h, i, query, key, kind: (b, h, key[i], 0))


def token_blocks(spec: Spec, tokens):
    """Blocks of `token_arrays`, whose batch may be 1."""
    if tokens is None:
        return None
    of_queries, of_keys = tokens
    return (
        pl.BlockSpec(
            (None, of_queries.shape[1], spec.blocks.queries),
            lambda b, h, i, query, key, kind: (b % of_queries.shape[0], 0, query[i]),
        ),
        pl.BlockSpec(
            (None, of_keys.shape[1], spec.blocks.keys),
            lambda b, h, i, query, key, kind: (b % of_keys.shape[0], 0, key[i]),
        ),
    )


def call(spec: Spec, kernel, tiles, arguments, in_specs, out_shape, out_specs, scratch, name):
    """Runs `kernel` over batch x key heads x visits, of which the last axis is sequential.

    `arguments[0]` is q, [B, Hkv, tiles, G, queries, D].
    """
    batch, kv_heads = arguments[0].shape[:2]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles),
            grid=(batch, kv_heads, len(tiles.kind)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=spec.interpret,
        name=name,
    )(*tiles, *arguments)
