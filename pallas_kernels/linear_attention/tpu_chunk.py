"""The three TPU kernels of linear attention: forward, gradient of the queries, gradient of keys and values.

Each walks the chunks of a few heads along the last, sequential axis of its grid, with a state in VMEM scratch: the
forward and the gradient of the queries from the first chunk to the last with the state, the gradient of keys and
values from the last to the first with the gradient of the state. So nothing of the states reaches HBM, and features
are computed where they are used.

With s over the keys and t over the queries of a chunk, S and Z the state before and after it, values v with a last row
of ones (so that the sum of the weights comes out beside the sum of the values), and u the gradient of the sums:

    w_st = φ(k_s) · φ(q_t) for s <= t             dw_st = v_s · u_t for s <= t
    sums_t = Σ_s v_s w_st + S φ(q_t)              dφ(q_t) = Σ_s φ(k_s) dw_st + Sᵀ u_t
    Z = S + Σ_s v_s φ(k_s)ᵀ                       dφ(k_s) = Σ_t φ(q_t) dw_st + dZᵀ v_s
    dS = dZ + Σ_t u_t φ(q_t)ᵀ                     dv_s = Σ_t u_t w_st + dZ φ(k_s)

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


def forward(spec: Spec, q, k, v, rows, state, out, total, last, carry, rings):
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
        carry: scratch float32 [H, E + ones, F].
        rings: scratch of `KernelFeatures.expand` for queries and keys of each head.
    """
    _start(carry, state)
    features, heads = spec.features, range(spec.blocks.heads)
    block = pl.program_id(2)

    def chunk(tokens):
        mask = _mask(spec, rows, tokens, block)
        values = [_with_ones(x, mask) for x in _take(spec, v, tokens)]
        queries, keys = (_take(spec, x, tokens) for x in (q, k))
        phi_q, phi_k = (_expanded(features, x, rings.at[i]) for i, x in enumerate((queries, keys)))
        left, right = _operands(features, (keys, queries), (phi_k, phi_q), v.dtype)
        weights = [
            _weights(features, *x, mask).astype(v.dtype) for x in zip(left, right, strict=True)
        ]
        phi_q = [_masked(x, mask.from_past).astype(v.dtype) for x in phi_q]
        phi_k = [_masked(x, mask.to_state).astype(v.dtype) for x in phi_k]
        pasts = [carry[h] for h in heads]
        sums = [_dot(pasts[h].astype(v.dtype), phi_q[h], PLAIN) for h in heads]
        sums = [sums[h] + _dot(values[h], weights[h], PLAIN) for h in heads]
        for h in heads:
            carry[h] = _masked(pasts[h], mask.keeps) + _dot(values[h], phi_k[h], LANES)
        dim, outputs = sums[0].shape[0] - ones_rows(v.dtype), []
        for h in heads:
            total_row = sums[h][dim : dim + 1] + features.scale * spec.eps
            divisor = total_row if spec.normalize else features.scale
            outputs.append(sums[h][:dim] * (1 / divisor))
            total[0, h, :, tokens] = total_row
        _put(spec, out, tokens, outputs)

    _for_each_chunk(spec, v.dtype, chunk)
    _finish(carry, last)


def query_gradient(
    spec: Spec, q, k, v, rows, state, d_out, out, total, dq, scales, carry, rings
) -> None:
    """The gradient of the queries; the states are made again on the way.

    Args:
        spec: static arguments.
        q: as in `forward`; so are k, v, rows.
        state: ref float32 [1, H, F, E + ones]; None: zeros.
        d_out: ref like v.
        out: ref like v; None without `normalize`.
        total: ref float32 [1, H, 1, T]; None without `normalize`.
        dq: ref like q.
        scales: ref float32 [1, H, 2, T]: what `d_out` is to be multiplied with, and the gradient of the total.
        carry: scratch float32 [H, F, E + ones].
        rings: as in `forward`.
    """
    _start(carry, state)
    features, heads, block = spec.features, range(spec.blocks.heads), pl.program_id(2)

    def chunk(tokens):
        mask = _mask(spec, rows, tokens, block)
        values = [_with_ones(x, mask) for x in _take(spec, v, tokens)]
        queries, keys = (_take(spec, x, tokens) for x in (q, k))
        d_outputs = _take(spec, d_out, tokens)
        _set_scales(spec, d_outputs, out, total, tokens, scales)
        d_sums = [_gradient_of_sums(x, scales, h, tokens) for h, x in enumerate(d_outputs)]
        phi_k = _expanded(features, keys, rings.at[0])
        d_weights = [jnp.where(mask.allowed, _dot(values[h], d_sums[h], ROWS), 0) for h in heads]
        pasts = [carry[h] for h in heads]
        d_phi = [
            _masked(_dot(pasts[h].astype(v.dtype), d_sums[h], PLAIN), mask.from_past) for h in heads
        ]
        if features.weigh is None:
            for h in heads:
                d_phi[h] += _dot(phi_k[h].astype(v.dtype), d_weights[h].astype(v.dtype), PLAIN)
        d_queries = [features.pull(_wide(queries[h]), d_phi[h]) for h in heads]
        if features.weigh is not None:
            left, right = _operands(features, (keys, queries), None, v.dtype)
            products = [_dot(*x, ROWS) for x in zip(left, right, strict=True)]
            for h in heads:
                d_products = d_weights[h] * features.slope(products[h])
                d_queries[h] += _dot(keys[h], d_products.astype(v.dtype), PLAIN)
        phi_k = [_masked(x, mask.to_state).astype(v.dtype) for x in phi_k]
        for h in heads:
            carry[h] = _masked(pasts[h], mask.keeps) + _dot(phi_k[h], values[h], LANES)
        _put(spec, dq, tokens, d_queries)

    _for_each_chunk(spec, v.dtype, chunk)


def key_value_gradient(
    spec: Spec, q, k, v, rows, d_last, d_out, scales, dk, dv, d_state, carry, rings
) -> None:
    """The gradients of keys, values and the state before the first token; blocks come from the last to the first.

    Args:
        spec: static arguments.
        q: as in `query_gradient`; so are k, v, rows, d_out, scales.
        d_last: ref float32 [1, H, F, E + ones], the gradient of the state after the last token.
        dk: ref like k.
        dv: ref like v.
        d_state: ref like `d_last`.
        carry: scratch float32 [H, F, E + ones], the gradient of the state after a chunk.
        rings: as in `forward`.
    """
    _start(carry, d_last)
    features, heads = spec.features, range(spec.blocks.heads)
    block = pl.num_programs(2) - 1 - pl.program_id(2)

    def chunk(tokens):
        mask = _mask(spec, rows, tokens, block)
        values = [_with_ones(x, mask) for x in _take(spec, v, tokens)]
        queries, keys = (_take(spec, x, tokens) for x in (q, k))
        d_outputs = _take(spec, d_out, tokens)
        d_sums = [_gradient_of_sums(x, scales, h, tokens) for h, x in enumerate(d_outputs)]
        phi_q, phi_k = (_expanded(features, x, rings.at[i]) for i, x in enumerate((queries, keys)))
        left, right = _operands(features, (keys, queries), (phi_k, phi_q), v.dtype)
        if features.weigh is None:
            queries = right
        products = [_dot(*x, ROWS) for x in zip(left, right, strict=True)]
        d_products = [jnp.where(mask.allowed, _dot(values[h], d_sums[h], ROWS), 0) for h in heads]
        if features.slope is not None:
            d_products = [d_products[h] * features.slope(products[h]) for h in heads]
        weights = products if features.weigh is None else [features.weigh(x) for x in products]
        weights = [jnp.where(mask.allowed, x, 0).astype(v.dtype) for x in weights]
        phi_q = [_masked(x, mask.from_past).astype(v.dtype) for x in phi_q]
        phi_k = [_masked(x, mask.to_state).astype(v.dtype) for x in phi_k]

        after = [carry[h] for h in heads]
        d_after = [x.astype(v.dtype) for x in after]
        d_phi = [_masked(_dot(d_after[h], values[h], PLAIN), mask.to_state) for h in heads]
        d_keys = [_dot(queries[h], d_products[h].astype(v.dtype), LANES) for h in heads]
        d_values = [_dot(d_sums[h], weights[h], LANES) for h in heads]
        for h in heads:
            d_values[h] += _dot(d_after[h], phi_k[h], ROWS)
            carry[h] = _masked(after[h], mask.keeps) + _dot(phi_q[h], d_sums[h], LANES)
        for h in heads:
            key = _wide(keys[h])
            if features.weigh is None:
                d_keys[h] = features.pull(key, d_phi[h] + d_keys[h])
            else:
                d_keys[h] += features.pull(key, d_phi[h])
        _put(spec, dk, tokens, d_keys)
        _put(spec, dv, tokens, [x[: -ones_rows(v.dtype)] for x in d_values])

    _for_each_chunk(spec, v.dtype, chunk, reverse=True)
    _finish(carry, d_state)


class _Mask(NamedTuple):
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


def _mask(spec, rows, tokens, block) -> _Mask:
    length = spec.blocks.chunk
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    first = block * spec.blocks.tokens + tokens.start
    position = first + jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
    valid = (position < spec.time).astype(jnp.float32)
    if rows is None:
        return _Mask(key <= query, valid)
    run, from_past, to_state, keeps = (rows[0, i : i + 1, tokens] for i in range(4))
    # Padding is run 0, and no query is of run -1.
    of_keys = jnp.broadcast_to(jnp.where(run == 0, -1, run), (length, length)).T
    allowed = (key <= query) & (of_keys == run)
    return _Mask(allowed, valid, from_past, to_state, keeps[:, :1])


def _weights(features, left, right, mask):
    products = _dot(left, right, ROWS)
    weights = products if features.weigh is None else features.weigh(products)
    return jnp.where(mask.allowed, weights, 0)


def _take(spec, ref, tokens) -> list:
    """[D, C] of each head, of a ref as `tpu` has it: [1, T, H * D] where blocks are turned, else [1, H, D, T]."""
    if not spec.blocks.turns:
        return [ref[0, h, :, tokens] for h in range(spec.blocks.heads)]
    turned = ref[0, tokens, :].T
    dim = turned.shape[0] // spec.blocks.heads
    return [turned[h * dim : (h + 1) * dim] for h in range(spec.blocks.heads)]


def _put(spec, ref, tokens, by_head) -> None:
    """The inverse of `_take`."""
    by_head = [x.astype(ref.dtype) for x in by_head]
    if spec.blocks.turns:
        ref[0, tokens, :] = jnp.concatenate(by_head, axis=0).T
        return
    for h, x in enumerate(by_head):
        ref[0, h, :, tokens] = x


def _expanded(features, vectors, rings) -> list:
    return [features.expand(_wide(x), rings.at[h]) for h, x in enumerate(vectors)]


def _operands(features, vectors, expanded, dtype) -> list[list]:
    """What the weights are inner products of: the vectors themselves where the map can weigh these."""
    if features.weigh is None:
        return [[y.astype(dtype) for y in x] for x in expanded]
    keys, queries = vectors
    return [
        [_with_rows(x, [1.0] * _PARTS) for x in keys],
        [_with_rows(x, _parts(features.offset, dtype)) for x in queries],
    ]


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


def _set_scales(spec, d_outputs, out, total, tokens, scales) -> None:
    """Of out = numerator / total, or without `normalize` numerator / scale: see `query_gradient`."""
    outputs = _take(spec, out, tokens) if spec.normalize else None
    for h, d_output in enumerate(d_outputs):
        if spec.normalize:
            inverse = 1 / total[0, h, :, tokens]
            products = _wide(d_output) * _wide(outputs[h])
            d_total = -jnp.sum(products, axis=0, keepdims=True) * inverse
        else:
            inverse = jnp.full((1, d_output.shape[1]), 1 / spec.features.scale, jnp.float32)
            d_total = jnp.zeros_like(inverse)
        scales[0, h, 0:1, tokens] = inverse
        scales[0, h, 1:2, tokens] = d_total


def _gradient_of_sums(d_output, scales, h, tokens):
    """[E + ones, C] in the dtype of the gradient of the output, [E, C]."""
    scale, d_total = (scales[0, h, i : i + 1, tokens] for i in range(2))
    d_numerator = (_wide(d_output) * scale).astype(d_output.dtype)
    return jnp.concatenate([d_numerator, _first_row(d_total, d_output.dtype)], axis=0)


def _with_ones(values, mask):
    return jnp.concatenate([values, _first_row(mask.valid, values.dtype)], axis=0)


def _first_row(row, dtype):
    """`row` and zeros below it, which fill up a register."""
    shape = (ones_rows(dtype), row.shape[1])
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where(index == 0, jnp.broadcast_to(row, shape), 0).astype(dtype)


def _masked(x, mask):
    return x if mask is None else x * mask


def _wide(x):
    return x.astype(jnp.float32)


def _dot(x, y, contracted):
    """A product with float32 sums; float32 operands are not rounded to the bfloat16 of the matrix unit."""
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _for_each_chunk(spec, dtype, chunk, reverse=False) -> None:
    length, count = spec.blocks.chunk, spec.blocks.tokens // spec.blocks.chunk

    def step(i, _):
        i = count - 1 - i if reverse else i
        chunk(pl.ds(pl.multiple_of(i * length, length), length))

    # Two chunks a step of the loop fill each other's waits. The interpreter has none, and products of float32, of many
    # passes, are long enough.
    unroll = 1 if spec.interpret or dtype == jnp.float32 else min(2, count)
    jax.lax.fori_loop(0, count, step, None, unroll=unroll)


def _start(carry, state) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = jnp.zeros_like(carry) if state is None else state[0]


def _finish(carry, last) -> None:
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[0] = carry[...]
