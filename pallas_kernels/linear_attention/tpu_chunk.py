"""The forward kernel of linear attention on TPU, and what it shares with the backward.

Both walk the chunks of a few heads along the last, sequential axis of their grid, with a state in VMEM scratch: the
forward from the first chunk to the last with the state, the backward from the last to the first with the gradient of
the state. Features are computed where they are used and never reach HBM.

With s over the keys and t over the queries of a chunk, S and Z the state before and after it, and values v with a last
row of ones (so that the sum of the weights comes out beside the sum of the values):

    w_st = φ(k_s) · φ(q_t) for s <= t
    sums_t = Σ_s v_s w_st + S φ(q_t)
    Z = S + Σ_s v_s φ(k_s)ᵀ

Heads are independent, and one product of one head waits for another: each step below is taken for all heads of a block
before the next one, since the compiler keeps about to the order of the program. So heads fill each other's waits.

Everything is [rows, tokens]: tokens fill the 128 lanes whatever the head dimension, and each product takes its
operands as they lie, but for keys and values on the left of w and dw, which the compiler transposes. Where the channels
of a block are whole registers, arrays come as the model has them and are turned here: their way through HBM would take
longer.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.tpu_blocks import Blocks, ones_rows
from pallas_kernels.linear_attention.tpu_features import KernelFeatures

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
        interpret: as `pallas_call` has it.
    """

    features: KernelFeatures
    blocks: Blocks
    heads: int
    time: int
    normalize: bool
    eps: float
    interpret: bool | pltpu.InterpretParams


def forward(spec: Spec, q, k, v, rows, state, out, total, last, pasts, carry, rings):
    """One block of tokens of a few heads.

    Args:
        spec: static arguments.
        q: ref [1, H, D, T], or [1, T, H * D] where `Blocks.turns`.
        k: ref like q.
        v: ref [1, H, E, T] or [1, T, H * E].
        rows: ref float32 [1, 4, T], `tpu.segment_rows`; None: one segment.
        state: ref float32 [1, H, E + ones, F], before the first token; None: zeros.
        out: ref like v.
        total: ref float32 [1, H, 1, T]: the sums of the weights.
        last: ref like `state`, after the last token.
        pasts: ref [1, H, chunks, E + ones, F], the states before the chunks; None: not wanted.
        carry: scratch float32 [H, E + ones, F].
        rings: scratch of `KernelFeatures.expand` for queries and keys of each head.
    """
    start(carry, state)
    features, heads, dtype = spec.features, range(spec.blocks.heads), v.dtype
    block = pl.program_id(2)

    def chunk(index, tokens):
        mask = chunk_mask(spec, rows, tokens, block)
        values = [with_ones(x, mask) for x in take(spec, v, tokens)]
        queries, keys = (take(spec, x, tokens) for x in (q, k))
        phi_q, phi_k = (
            [features.expand(wide(x[h]), rings.at[i, h]) for h in heads]
            for i, x in enumerate((queries, keys))
        )
        weights = []
        for h in heads:
            left, right = operands(features, keys[h], queries[h], phi_k[h], phi_q[h], dtype)
            products = dot(left, right, ROWS)
            products = products if features.weigh is None else features.weigh(products)
            weights.append(jnp.where(mask.allowed, products, 0).astype(dtype))
        phi_q = [masked(x, mask.from_past).astype(dtype) for x in phi_q]
        phi_k = [masked(x, mask.to_state).astype(dtype) for x in phi_k]
        before = [carry[h] for h in heads]
        narrow = [x.astype(dtype) for x in before]
        if pasts is not None:
            for h in heads:
                pasts[0, h, index] = narrow[h]
        sums = [dot(narrow[h], phi_q[h], PLAIN) for h in heads]
        sums = [sums[h] + dot(values[h], weights[h], PLAIN) for h in heads]
        for h in heads:
            carry[h] = masked(before[h], mask.keeps) + dot(values[h], phi_k[h], LANES)
        dim, outputs = sums[0].shape[0] - ones_rows(dtype), []
        for h in heads:
            total_row = sums[h][dim : dim + 1] + features.scale * spec.eps
            divisor = total_row if spec.normalize else features.scale
            outputs.append(sums[h][:dim] * (1 / divisor))
            total[0, h, :, tokens] = total_row
        put(spec, out, tokens, outputs)

    for_each_chunk(spec, dtype, chunk)
    finish(carry, last)


class ChunkMask(NamedTuple):
    """Which tokens of a chunk meet.

    Attributes:
        allowed: bool [keys, queries].
        valid: float32 [1, C], 0 past the end of the sequence.
        from_past: float32 [1, C], 1 for queries of the segment that the state before the chunk is of; None: all.
        to_state: float32 [1, C], 1 for keys of the segment that the state after it is of; None: all.
        keeps: float32 [1, 1], 1 where those two segments are one; None: 1.
    """

    allowed: jax.Array
    valid: jax.Array
    from_past: jax.Array | None = None
    to_state: jax.Array | None = None
    keeps: jax.Array | None = None


def chunk_mask(spec, rows, tokens, block) -> ChunkMask:
    length = spec.blocks.chunk
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    first = block * spec.blocks.tokens + tokens.start
    position = first + jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
    valid = (position < spec.time).astype(jnp.float32)
    if rows is None:
        return ChunkMask(key <= query, valid)
    run, from_past, to_state, keeps = (rows[0, i : i + 1, tokens] for i in range(4))
    # Padding is run 0, and no query is of run -1.
    of_keys = jnp.broadcast_to(jnp.where(run == 0, -1, run), (length, length)).T
    allowed = (key <= query) & (of_keys == run)
    return ChunkMask(allowed, valid, from_past, to_state, keeps[:, :1])


def take(spec, ref, tokens) -> list:
    """[D, C] of each head, of a ref as `tpu` has it: [1, T, H * D] where blocks are turned, else [1, H, D, T]."""
    if not spec.blocks.turns:
        return [ref[0, h, :, tokens] for h in range(spec.blocks.heads)]
    turned = ref[0, tokens, :].T
    dim = turned.shape[0] // spec.blocks.heads
    return [turned[h * dim : (h + 1) * dim] for h in range(spec.blocks.heads)]


def put(spec, ref, tokens, by_head) -> None:
    """The inverse of `take`."""
    by_head = [x.astype(ref.dtype) for x in by_head]
    if spec.blocks.turns:
        ref[0, tokens, :] = jnp.concatenate(by_head, axis=0).T
        return
    for h, x in enumerate(by_head):
        ref[0, h, :, tokens] = x


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


def dot(x, y, contracted):
    """A product with float32 sums; float32 operands are not rounded to the bfloat16 of the matrix unit."""
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def for_each_chunk(spec, dtype, chunk, reverse=False) -> None:
    length, count = spec.blocks.chunk, spec.blocks.tokens // spec.blocks.chunk

    def step(i, _):
        i = count - 1 - i if reverse else i
        chunk(i, pl.ds(pl.multiple_of(i * length, length), length))

    # Two chunks a step of the loop fill each other's waits. The interpreter has none, and products of float32, of many
    # passes, are long enough.
    unroll = 1 if spec.interpret or dtype == jnp.float32 else min(2, count)
    jax.lax.fori_loop(0, count, step, None, unroll=unroll)


def start(carry, state) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = jnp.zeros_like(carry) if state is None else state[0]


def finish(carry, last) -> None:
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[0] = carry[...]
