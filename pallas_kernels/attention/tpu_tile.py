"""What the forward and backward TPU kernels share: the static specification, one tile of logits, and the call.

q, k and v have their heads side by side (`lanes`), and the statistics of the queries are [B, programs, heads, T]. Time
is padded to whole tiles. Logits are in base 2, whose exponential the hardware has.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import visits
from pallas_kernels.attention.blocks import LANES, Blocks, heads_together
from pallas_kernels.attention.lanes import Heads
from pallas_kernels.attention.mask import PADDING, Mask, Tokens, token_rows
from pallas_kernels.blocks import largest_divisor
from pallas_kernels.tpu_call import tpu_call

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
        heads: of a program.
        has_tokens: positions or segments come as arrays; else position is index.
        interpret: what `pallas_call` takes.
    """

    mask: Mask
    scale: float
    logits_soft_cap: float | None
    blocks: Blocks
    heads: Heads
    has_tokens: bool
    interpret: Any

    def together(self, itemsize: int) -> int:
        """Blocks of q that are worked on together, if their entries are of so many bytes."""
        room = heads_together(*self.blocks, itemsize) // self.heads.sides
        return largest_divisor(self.heads.blocks, room)


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


class Part(NamedTuple):
    """A part of a tile: which queries and which keys of it."""

    queries: slice
    keys: slice


def allowed(spec: Spec, query_tile, key_tile, tokens, part: Part, *, queries_axis: int):
    """Which logits of a part of a tile count.

    Args:
        spec: the specification.
        query_tile: index of the tile along the queries.
        key_tile: along the keys.
        tokens: None, or the pair of blocks int32 [1 or 2, block] of the queries and of the keys.
        part: of the tile.
        queries_axis: 0 for a tile [queries, keys], 1 for [keys, queries].
    """
    blocks = spec.blocks
    if tokens is None:
        query_shape, key_shape = [1, 1], [1, 1]
        query_shape[queries_axis] = part.queries.stop - part.queries.start
        key_shape[1 - queries_axis] = part.keys.stop - part.keys.start
        query = jax.lax.broadcasted_iota(jnp.int32, query_shape, queries_axis)
        key = jax.lax.broadcasted_iota(jnp.int32, key_shape, 1 - queries_axis)
        key += key_tile * blocks.keys + part.keys.start
        if spec.mask.num_keys % blocks.keys:
            key = jnp.where(key < spec.mask.num_keys, key, PADDING)
        first_query = query_tile * blocks.queries + part.queries.start
        queries = Tokens(query + (first_query + spec.mask.offset), None)
        keys = Tokens(key, None)
    else:
        queries, keys = (
            Tokens(*(_along(x[i : i + 1, at], axis) for i in range(len(x))), *[None] * (2 - len(x)))
            for x, at, axis in zip(tokens, part, (queries_axis, 1 - queries_axis), strict=True)
        )
    return spec.mask.allowed(queries, keys)


def for_each_kind(spec: Spec, tiles, kind, along: str, function) -> None:
    """Calls `function(parts, sides, is_masked)` with the parts of the visited tile that hold something, if any do.

    `sides` are those of the program that are key heads.

    Args:
        spec: the specification.
        tiles: the static list of all visits; what is in none of them makes no code.
        kind: of this visit.
        along: which side the parts are of when the tile is cut, "queries" or "keys".
        function: what to do.
    """
    decisive = visits.MASKED | visits.CUT | visits.EMPTY
    is_last = pl.program_id(1) == spec.heads.programs - 1
    programs = [(spec.heads.sides, ~is_last), (1, is_last)]
    for variant in sorted(set((tiles.kind & decisive).tolist()) - {visits.EMPTY}):
        parts = _parts(spec, along, variant & visits.CUT != 0)
        is_variant = kind & decisive == variant
        for sides, here in programs if spec.heads.is_odd else [(spec.heads.sides, True)]:
            pl.when(is_variant & here)(
                functools.partial(function, parts, sides, variant & visits.MASKED != 0)
            )


def _parts(spec: Spec, along: str, is_cut: bool) -> list[Part]:
    queries, keys = (slice(0, size) for size in spec.blocks)
    if not is_cut:
        return [Part(queries, keys)]
    lower, upper = (Part(*halves) for halves in zip(*map(_halves, spec.blocks), strict=True))
    if along == "queries":
        return [lower, Part(upper.queries, keys)]
    return [Part(queries, lower.keys), upper]


def _halves(size: int) -> tuple[slice, slice]:
    return slice(0, size // 2), slice(size // 2, size)


def _along(row, axis: int):
    return row if axis == 1 else to_column(row)


def to_column(row):
    """[1, n] -> [n, 1]; n is a multiple of 128."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def to_row(column):
    """[n, 1] -> [1, n]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


# The call.


def token_arrays(spec: Spec, queries: Tokens, keys: Tokens):
    """Positions and segments, if any, of queries and of keys as two int32 [B, 1 or 2, T padded]; None if not needed."""
    if not spec.has_tokens:
        return None
    # A padded query has the position of no query, so that in the order of index it sees nothing that counts.
    return (
        token_rows(queries, spec.blocks.queries, 0),
        token_rows(keys, spec.blocks.keys, PADDING),
    )


def query_block(spec: Spec, head_lanes: int) -> pl.BlockSpec:
    """The tile [queries, blocks * head_lanes] of q, or of what has its shape, that a visit reads or writes."""
    return pl.BlockSpec(
        (None, spec.blocks.queries, spec.heads.blocks * head_lanes),
        lambda b, h, i, query, key, kind: (b, query[i], h),
    )


def row_block(spec: Spec) -> pl.BlockSpec:
    """The tile [heads, queries] of a statistic that a visit reads or writes."""
    return pl.BlockSpec(
        (None, None, spec.heads.queries, spec.blocks.queries),
        lambda b, h, i, query, key, kind: (b, h, 0, query[i]),
    )


def key_block(spec: Spec, head_lanes: int) -> pl.BlockSpec:
    """The tile [keys, abreast * head_lanes] of k or v that a visit reads or writes."""
    return pl.BlockSpec(
        (None, spec.blocks.keys, spec.heads.abreast * head_lanes),
        lambda b, h, i, query, key, kind: (b, key[i], h),
    )


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
    """Runs `kernel` over batch x programs of `heads` x visits, of which the last axis is sequential."""
    return tpu_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles),
            grid=(arguments[0].shape[0], spec.heads.programs, len(tiles.kind)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            # Of copies, whose blocks are those of `visits`: they would take a tenth of a short visit.
            disable_bounds_checks=True,
        ),
        interpret=spec.interpret,
        name=name,
    )(*tiles, *arguments)
