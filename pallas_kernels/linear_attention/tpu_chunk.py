"""The forward kernel of linear attention on TPU, and what it shares with the backward.

Both walk the chunks of a few heads of a few sequences along the last, sequential axis of their grid, with a state in
VMEM scratch: the forward from the first chunk to the last with the state, the backward from the last to the first with
the gradient of the state. Features are computed where they are used and never reach HBM.

With s over the keys and t over the queries of a chunk, S and Z the state before and after it, and values v with a last
row of ones (so that the sum of the weights comes out beside the sum of the values):

    w_st = φ(k_s) · φ(q_t) for s <= t
    sums_t = Σ_s v_s w_st + S φ(q_t)
    Z = S + Σ_s v_s φ(k_s)ᵀ

Heads are independent, of one sequence or of several, and one product of one head waits for another: heads go through
the stages below behind one another, the products of some beside the elementwise work of others, since the compiler
keeps about to the order of the program. So heads fill each other's waits. Products with the state need no weights, but
come with those of the weights and not before: so stages of products and of elementwise work alternate, and less waits
in between.

Everything is [rows, tokens]: tokens fill the 128 lanes whatever the head dimension, and each product takes its
operands as they lie, but for keys and values on the left of w and dw, which the compiler transposes. Arrays with whole
registers of channels a block come as the model has them and are turned here: their way through HBM would take longer.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import largest_divisor
from pallas_kernels.linear_attention.tpu_blocks import LANES as REGISTER
from pallas_kernels.linear_attention.tpu_blocks import Blocks, ones_rows
from pallas_kernels.linear_attention.tpu_features import KernelFeatures
from pallas_kernels.pipelined import pipelined
from pallas_kernels.tpu_dot import dot

# Contracted dimensions of a product.
ROWS = ((0,), (0,))
PLAIN = ((1,), (0,))
LANES = ((1,), (1,))


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments.

    Attributes:
        features: of queries and keys.
        blocks: sizes.
        heads: all of them.
        time: tokens before padding to whole blocks.
        normalize: whether sums are divided by those of the weights.
        eps: on top of these.
        return_state: whether the state after the last token is wanted.
        interpret: as `pallas_call` has it.
    """

    features: KernelFeatures
    blocks: Blocks
    heads: int
    time: int
    normalize: bool
    eps: float
    return_state: bool
    interpret: bool | pltpu.InterpretParams


def forward(spec: Spec, q, k, v, rows, state, out, total, last, pasts, carry, rings):
    """One block of tokens of a few heads of a few sequences, of B and H in the shapes below.

    Args:
        spec: static arguments.
        q: ref [B, H, D, T], or [B, T, H * D] where `Blocks.turns(D)`.
        k: ref like q.
        v: ref [B, H, E, T] or [B, T, H * E], likewise.
        rows: ref float32 [B, 4, T], `tpu.segment_rows`; None: one segment.
        state: ref float32 [B, H, E + ones, F], before the first token; None: zeros.
        out: ref like v.
        total: ref float32 [B, H, 1, T]: the sums of the weights; None: not wanted.
        last: ref like `state`, after the last token; None: not wanted.
        pasts: ref [B, H, chunks, E + ones, F], the states before the chunks; None: not wanted.
        carry: scratch float32 [B, H, E + ones, F].
        rings: scratch of `KernelFeatures.expand` for queries and keys of each head of each sequence of a turn's chunks.
    """
    start(carry, state)
    features, heads, dtype = spec.features, range(spec.blocks.heads), v.dtype
    block = pl.program_id(2)

    def turn(chunks):
        @functools.cache
        def of_chunk(place, sequence):
            _, tokens = chunks[place]
            mask = chunk_mask(spec, rows, sequence, tokens, block)
            values = [with_ones(x, mask) for x in take(spec, v, sequence, tokens)]
            return tokens, mask, *(take(spec, x, sequence, tokens) for x in (q, k)), values, []

        def expand(item, _):
            _, mask, queries, keys, *_ = of_chunk(item.chunk, item.sequence)
            query, key = queries[item.head], keys[item.head]
            phi_q, phi_k = (
                features.expand(wide(x), rings.at[i, item.chunk, item.sequence, item.head])
                for i, x in enumerate((query, key))
            )
            left, right = operands(features, key, query, phi_k, phi_q, dtype)
            phi_q, phi_k = masked(phi_q, mask.from_past), masked(phi_k, mask.to_state)
            return left, right, phi_q.astype(dtype), phi_k.astype(dtype)

        def multiply(item, expanded):
            left, right, *features_of = expanded
            return dot(left, right, ROWS), *features_of

        def weigh(item, multiplied):
            products, *features_of = multiplied
            mask = of_chunk(item.chunk, item.sequence)[1]
            weights = where_seen(mask, features.weigh, products)
            return weights.astype(dtype), *features_of

        def multiply_others(item, weighed):
            weights, phi_q, phi_k = weighed
            _, mask, *_, values, _ = of_chunk(item.chunk, item.sequence)
            before = carry[item.sequence, item.head]
            past = before.astype(dtype)
            if pasts is not None:
                pasts[item.sequence, item.head, chunks[item.chunk][0]] = past
            written = dot(values[item.head], phi_k, LANES)
            carry[item.sequence, item.head] = masked(before, mask.keeps) + written
            return dot(past, phi_q, PLAIN) + dot(values[item.head], weights, PLAIN)

        def divide(item, sums):
            tokens, *_, outputs = of_chunk(item.chunk, item.sequence)
            dim = sums.shape[0] - ones_rows(dtype)
            total_row = sums[dim : dim + 1] + features.scale * spec.eps
            divisor = total_row if spec.normalize else features.scale
            if total is not None:
                total[item.sequence, item.head, :, tokens] = total_row
            outputs.append((sums[:dim] * (1 / divisor)).astype(dtype))
            if item.head == heads[-1]:
                put(out, item.sequence, tokens, outputs)

        pipelined(items_of(spec, chunks), expand, multiply, weigh, multiply_others, divide)

    for_each_turn(spec, dtype, turn)
    finish(carry, last)


class Item(NamedTuple):
    """What goes through the stages: a head of a sequence of a chunk, which is counted from the first of a turn."""

    chunk: int
    sequence: int
    head: int


def items_of(spec, chunks) -> list[Item]:
    """Of a turn, in order."""
    counts = len(chunks), spec.blocks.sequences, spec.blocks.heads
    return [Item(*place) for place in np.ndindex(*counts)]


class ChunkMask(NamedTuple):
    """Which tokens of a chunk meet.

    Attributes:
        seen: {(i, j): bool [128 keys, 128 queries]}, or None: all of them, of tiles of registers in which any meet.
        valid: float32 [1, C], 0 past the end of the sequence.
        from_past: float32 [1, C], 1 for queries of the segment that the state before the chunk is of; None: all.
        to_state: float32 [1, C], 1 for keys of the segment that the state after it is of; None: all.
        keeps: float32 [1, 1], 1 where those two segments are one; None: 1.
    """

    seen: dict[tuple[int, int], jax.Array | None]
    valid: jax.Array
    from_past: jax.Array | None = None
    to_state: jax.Array | None = None
    keeps: jax.Array | None = None


def chunk_mask(spec, rows, sequence, tokens, block) -> ChunkMask:
    length = spec.blocks.chunk
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (REGISTER,) * 2, axis) for axis in (0, 1))
    in_order = key <= query
    tiles = [(i, j) for j in range(length // REGISTER) for i in range(j + 1)]
    first = block * spec.blocks.tokens + tokens.start
    position = first + jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
    valid = (position < spec.time).astype(jnp.float32)
    if rows is None:
        return ChunkMask({(i, j): in_order if i == j else None for i, j in tiles}, valid)
    run, from_past, to_state, keeps = (rows[sequence, i : i + 1, tokens] for i in range(4))
    # Padding is run 0, and no query is of run -1.
    of_keys = jnp.where(run == 0, -1, run)
    seen = {}
    for i, j in tiles:
        is_one = _turned(_register(of_keys, i)) == _register(run, j)
        seen[i, j] = in_order & is_one if i == j else is_one
    return ChunkMask(seen, valid, from_past, to_state, keeps[:, :1])


def _register(row, i: int):
    return row[:, i * REGISTER : (i + 1) * REGISTER]


def _turned(row):
    """[1, 128] -> [128, 128], the numbers of the row on sublanes."""
    return jnp.broadcast_to(row, (REGISTER,) * 2).T


def where_seen(mask, function, *pairs):
    """`function` of numbers of pairs [keys, queries], None: the number itself; and 0 for pairs that do not meet.

    It is computed where any of a tile of registers meet, and masked where not all do.
    """
    count = pairs[0].shape[0] // REGISTER
    columns = []
    for j in range(count):
        tiles = []
        for i in range(count):
            if (i, j) not in mask.seen:
                tiles.append(jnp.zeros((REGISTER,) * 2, pairs[0].dtype))
                continue
            rows, lanes = (slice(k * REGISTER, (k + 1) * REGISTER) for k in (i, j))
            tile, seen = [x[rows, lanes] for x in pairs], mask.seen[i, j]
            tile = tile[0] if function is None else function(*tile)
            tiles.append(tile if seen is None else jnp.where(seen, tile, 0))
        columns.append(jnp.concatenate(tiles, axis=0))
    return jnp.concatenate(columns, axis=1)


def take(spec, ref, sequence, tokens) -> list:
    """[D, C] of each head, of a ref as `tpu` has it: [B, T, H * D] where it is turned here, else [B, H, D, T]."""
    if len(ref.shape) == 4:
        return [ref[sequence, h, :, tokens] for h in range(spec.blocks.heads)]
    turned = ref[sequence, tokens, :].T
    dim = turned.shape[0] // spec.blocks.heads
    return [turned[h * dim : (h + 1) * dim] for h in range(spec.blocks.heads)]


def put(ref, sequence, tokens, by_head) -> None:
    """The inverse of `take`."""
    by_head = [x.astype(ref.dtype) for x in by_head]
    if len(ref.shape) == 3:
        ref[sequence, tokens, :] = jnp.concatenate(by_head, axis=0).T
        return
    for h, x in enumerate(by_head):
        ref[sequence, h, :, tokens] = x


def operands(features, key, query, phi_k, phi_q, dtype):
    """What the weights are inner products of: the vectors themselves where the map can weigh these."""
    if features.weigh is None:
        return phi_k.astype(dtype), phi_q.astype(dtype)
    offset = _parts(features.offset, dtype)
    return _with_rows(key, [1.0] * _PARTS), _with_rows(query, offset)


# Of a number that is no bfloat16 itself: three have the digits of a float32.
_PARTS = 3


def _parts(number: float, dtype) -> list[float]:
    """Numbers of `dtype` whose sum is `number`."""
    parts = []
    for _ in range(_PARTS):
        parts.append(float(np.asarray(number - sum(parts), dtype)))
    return parts


def _with_rows(x, numbers):
    """[D, C] -> [D + a register of rows, C], the first of them constant and the others 0."""
    shape = (ones_rows(x.dtype), x.shape[1])
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    rows = jnp.zeros(shape, jnp.float32)
    for i, number in enumerate(numbers):
        rows = jnp.where(row == i, number, rows)
    return jnp.concatenate([x, rows.astype(x.dtype)], axis=0)


def with_ones(values, mask):
    return jnp.concatenate([values, first_row(mask.valid, values.dtype)], axis=0)


def first_row(row, dtype):
    """`row` and zeros below it, which fill up a register."""
    shape = (ones_rows(dtype), row.shape[1])
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where(index == 0, jnp.broadcast_to(row, shape), 0).astype(dtype)


def masked(x, mask):
    return x if mask is None else x * mask


def wide(x):
    return x.astype(jnp.float32)


# Tokens that go through the stages behind one another, chunk after chunk: the code is as long.
_TURN = 512


def chunks_of_turn(sizes: Blocks, dtype) -> int:
    """Chunks that fill each other's waits; products of float32, of many passes, are long enough by themselves."""
    count = sizes.tokens // sizes.chunk
    most = 1 if dtype == jnp.float32 else max(1, _TURN // sizes.chunk)
    return largest_divisor(count, most)


def for_each_turn(spec, dtype, turn, reverse=False) -> None:
    """Calls `turn` with pairs (number of a chunk, its tokens) of some chunks in order, until all had theirs."""
    length, count = spec.blocks.chunk, spec.blocks.tokens // spec.blocks.chunk
    together = chunks_of_turn(spec.blocks, dtype)

    def step(i, _):
        numbers = [i * together + j for j in range(together)]
        numbers = [count - 1 - n if reverse else n for n in numbers]
        turn([(n, pl.ds(pl.multiple_of(n * length, length), length)) for n in numbers])

    jax.lax.fori_loop(0, count // together, step, None)


def start(carry, state) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = jnp.zeros_like(carry) if state is None else state[...]


def finish(carry, last) -> None:
    if last is None:
        return

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[...] = carry[...]
