"""The backward of linear attention on TPU: one kernel, from the last chunk to the first.

As in `tpu_chunk`, with u the gradient of the sums; the forward kept the states S before the chunks:

    dw_st = v_s · u_t for s <= t
    dφ(q_t) = Σ_s φ(k_s) dw_st + Sᵀ u_t
    dφ(k_s) = Σ_t φ(q_t) dw_st + dZᵀ v_s
    dv_s = Σ_t u_t w_st + dZ φ(k_s)
    dS = dZ + Σ_t u_t φ(q_t)ᵀ

Heads go through the stages below as in the forward, the products of some beside the elementwise work of others: the
products that weights are made of come first, all others, and those with the state among them, once there are weights.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.tpu_blocks import ones_rows
from pallas_kernels.linear_attention.tpu_chunk import (
    LANES,
    PLAIN,
    ROWS,
    ChunkMask,
    Spec,
    chunk_mask,
    finish,
    first_row,
    for_each_turn,
    items_of,
    masked,
    operands,
    put,
    start,
    take,
    where_seen,
    wide,
    with_ones,
)
from pallas_kernels.pipelined import pipelined
from pallas_kernels.tpu_dot import dot


def backward(
    spec: Spec, q, k, v, rows, pasts, d_last, d_out, out, total, dq, dk, dv, d_state, carry, rings
) -> None:
    """The gradients of queries, keys, values and the state before the first token.

    Args:
        spec: static arguments.
        q: as in `tpu_chunk.forward`; so are k, v, rows and pasts.
        d_last: ref float32 [B, H, F, E + ones], the gradient of the state after the last token; None: zeros.
        d_out: ref like v.
        out: ref like v; None without `normalize`.
        total: ref float32 [B, H, 1, T]; None without `normalize`.
        dq: ref like q.
        dk: ref like k.
        dv: ref like v.
        d_state: ref like `d_last`; None: not wanted.
        carry: scratch float32 [B, H, F, E + ones], the gradient of the state after a chunk.
        rings: as in `tpu_chunk.forward`.
    """
    start(carry, d_last)
    features, heads, dtype = spec.features, range(spec.blocks.heads), v.dtype
    block = pl.num_programs(2) - 1 - pl.program_id(2)

    def turn(chunks):
        @functools.cache
        def of_chunk(place, sequence):
            _, tokens = chunks[place]
            mask = chunk_mask(spec, rows, sequence, tokens, block)
            values = [with_ones(x, mask) for x in take(spec, v, sequence, tokens)]
            queries, keys = (take(spec, x, sequence, tokens) for x in (q, k))
            d_sums = _gradients_of_sums(spec, d_out, out, total, sequence, tokens)
            return _Chunk(tokens, mask, queries, keys, values, d_sums, ([], [], []))

        def expand(item, _):
            chunk = of_chunk(item.chunk, item.sequence)
            query, key = chunk.queries[item.head], chunk.keys[item.head]
            phi_q, phi_k = (
                features.expand(wide(x), rings.at[i, item.chunk, item.sequence, item.head])
                for i, x in enumerate((query, key))
            )
            left, right = operands(features, key, query, phi_k, phi_q, dtype)
            phi_q, phi_k = masked(phi_q, chunk.mask.from_past), masked(phi_k, chunk.mask.to_state)
            return left, right, phi_q.astype(dtype), phi_k.astype(dtype)

        def multiply(item, expanded):
            left, right, *features_of = expanded
            chunk = of_chunk(item.chunk, item.sequence)
            value, d_sum = chunk.values[item.head], chunk.d_sums[item.head]
            products, d_weights = dot(left, right, ROWS), dot(value, d_sum, ROWS)
            return left, right, products, d_weights, *features_of

        def weigh(item, multiplied):
            left, right, products, d_weights, *features_of = multiplied
            chunk = of_chunk(item.chunk, item.sequence)
            if features.weigh is None:
                weights, d_products = (
                    where_seen(chunk.mask, None, x) for x in (products, d_weights)
                )
            else:
                weights = where_seen(chunk.mask, features.weigh, products)
                d_products = where_seen(chunk.mask, d_product, products, d_weights)
                # Products are of the vectors themselves.
                left, right = chunk.keys[item.head], chunk.queries[item.head]
            return left, right, weights.astype(dtype), d_products.astype(dtype), *features_of

        def d_product(products, d_weights):
            return d_weights * features.slope(products)

        def multiply_others(item, weighed):
            left, right, weights, d_products, phi_q, phi_k = weighed
            chunk = of_chunk(item.chunk, item.sequence)
            mask, value, d_sum = chunk.mask, chunk.values[item.head], chunk.d_sums[item.head]
            to_query, to_key = dot(left, d_products, PLAIN), dot(right, d_products, LANES)
            after = carry[item.sequence, item.head]
            d_after = after.astype(dtype)
            d_phi_q = dot(pasts[item.sequence, item.head, chunks[item.chunk][0]], d_sum, ROWS)
            d_phi_k = dot(d_after, value, PLAIN)
            d_value = dot(d_after, phi_k, ROWS)
            carry[item.sequence, item.head] = masked(after, mask.keeps) + dot(phi_q, d_sum, LANES)
            d_phi_q, d_phi_k = masked(d_phi_q, mask.from_past), masked(d_phi_k, mask.to_state)
            d_value += dot(d_sum, weights, LANES)
            return to_query, to_key, d_phi_q, d_phi_k, d_value

        def pull(item, multiplied):
            to_query, to_key, d_phi_q, d_phi_k, d_value = multiplied
            chunk = of_chunk(item.chunk, item.sequence)
            query, key = chunk.queries[item.head], chunk.keys[item.head]
            ring_q, ring_k = (rings.at[i, item.chunk, item.sequence, item.head] for i in range(2))
            gradients = (
                _pulled(features, query, d_phi_q, to_query, ring_q),
                _pulled(features, key, d_phi_k, to_key, ring_k),
                d_value[: -ones_rows(dtype)],
            )
            for found, gradient in zip(chunk.gradients, gradients, strict=True):
                found.append(gradient.astype(dtype))
            if item.head == heads[-1]:
                for ref, found in zip((dq, dk, dv), chunk.gradients, strict=True):
                    put(ref, item.sequence, chunk.tokens, found)

        together = max(1, _TOGETHER // spec.blocks.chunk)
        items = items_of(spec, chunks)
        stages = expand, multiply, weigh, multiply_others, pull
        pipelined(items, *stages, together=together, first=2)

    for_each_turn(spec, dtype, turn, reverse=True)
    finish(carry, d_state)


# Tokens whose products are long enough for all matrix units: a head of that many goes by itself, shorter ones together.
_TOGETHER = 256


class _Chunk(NamedTuple):
    """Of a chunk what its heads take, in lists by head, and their gradients as they come."""

    tokens: pl.Slice
    mask: ChunkMask
    queries: list
    keys: list
    values: list
    d_sums: list
    gradients: tuple[list, list, list]


def _pulled(features, vector, d_phi, through_weights, ring):
    """Gradient of a query or key from that of its features, and from what came through the weights."""
    if features.weigh is None:
        return features.pull(wide(vector), d_phi + through_weights, ring)
    return features.pull(wide(vector), d_phi, ring) + features.slope_scale * through_weights


def _gradients_of_sums(spec, d_out, out, total, sequence, tokens) -> list[jax.Array]:
    """[E + ones, C] of each head, of out = numerator / total, or without `normalize` numerator / scale."""
    d_outputs, found = take(spec, d_out, sequence, tokens), []
    outputs = take(spec, out, sequence, tokens) if spec.normalize else None
    for h, d_output in enumerate(d_outputs):
        if spec.normalize:
            inverse = 1 / total[sequence, h, :, tokens]
            products = wide(d_output) * wide(outputs[h])
            d_total = -jnp.sum(products, axis=0, keepdims=True) * inverse
        else:
            inverse = 1 / spec.features.scale
            d_total = jnp.zeros((1, d_output.shape[1]), jnp.float32)
        d_numerator = (wide(d_output) * inverse).astype(d_output.dtype)
        d_total = first_row(d_total, d_output.dtype)
        found.append(jnp.concatenate([d_numerator, d_total], axis=0))
    return found
