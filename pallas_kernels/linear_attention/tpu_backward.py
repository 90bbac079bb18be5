"""The backward of linear attention on TPU: one kernel, from the last chunk to the first.

As in `tpu_chunk`, with u the gradient of the sums; the forward kept the states S before the chunks:

    dw_st = v_s · u_t for s <= t
    dφ(q_t) = Σ_s φ(k_s) dw_st + Sᵀ u_t
    dφ(k_s) = Σ_t φ(q_t) dw_st + dZᵀ v_s
    dv_s = Σ_t u_t w_st + dZ φ(k_s)
    dS = dZ + Σ_t u_t φ(q_t)ᵀ

There is more to do between products than in the forward, so that heads go through the stages below behind one another,
the products of some beside the elementwise work of others.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.tpu_blocks import ones_rows
from pallas_kernels.linear_attention.tpu_chunk import (
    LANES,
    PLAIN,
    ROWS,
    Spec,
    chunk_mask,
    dot,
    finish,
    first_row,
    for_each_chunk,
    masked,
    operands,
    put,
    start,
    take,
    wide,
    with_ones,
)
from pallas_kernels.pipelined import pipelined


def backward(
    spec: Spec, q, k, v, rows, pasts, d_last, d_out, out, total, dq, dk, dv, d_state, carry, rings
) -> None:
    """The gradients of queries, keys, values and the state before the first token.

    Args:
        spec: static arguments.
        q: as in `tpu_chunk.forward`; so are k, v, rows and pasts.
        d_last: ref float32 [1, H, F, E + ones], the gradient of the state after the last token.
        d_out: ref like v.
        out: ref like v; None without `normalize`.
        total: ref float32 [1, H, 1, T]; None without `normalize`.
        dq: ref like q.
        dk: ref like k.
        dv: ref like v.
        d_state: ref like `d_last`.
        carry: scratch float32 [H, F, E + ones], the gradient of the state after a chunk.
        rings: as in `tpu_chunk.forward`.
    """
    start(carry, d_last)
    features, heads, dtype = spec.features, range(spec.blocks.heads), v.dtype
    block = pl.num_programs(2) - 1 - pl.program_id(2)

    def chunk(index, tokens):
        mask = chunk_mask(spec, rows, tokens, block)
        values = [with_ones(x, mask) for x in take(spec, v, tokens)]
        queries, keys = (take(spec, x, tokens) for x in (q, k))
        d_sums = _gradients_of_sums(spec, d_out, out, total, tokens)
        found = {}

        def expand(h, _):
            phi_q, phi_k = (
                features.expand(wide(x[h]), rings.at[i, h]) for i, x in enumerate((queries, keys))
            )
            left, right = operands(features, keys[h], queries[h], phi_k, phi_q, dtype)
            phi_q, phi_k = masked(phi_q, mask.from_past), masked(phi_k, mask.to_state)
            return left, right, phi_q.astype(dtype), phi_k.astype(dtype)

        def multiply(h, expanded):
            left, right, phi_q, phi_k = expanded
            products, d_weights = dot(left, right, ROWS), dot(values[h], d_sums[h], ROWS)
            after = carry[h]
            d_after = after.astype(dtype)
            d_phi_q = masked(dot(pasts[0, h, index], d_sums[h], ROWS), mask.from_past)
            d_phi_k = masked(dot(d_after, values[h], PLAIN), mask.to_state)
            d_value = dot(d_after, phi_k, ROWS)
            carry[h] = masked(after, mask.keeps) + dot(phi_q, d_sums[h], LANES)
            return left, right, products, d_weights, d_phi_q, d_phi_k, d_value

        def weigh(h, multiplied):
            left, right, products, d_weights, *others = multiplied
            d_products = jnp.where(mask.allowed, d_weights, 0)
            weights = products
            if features.weigh is not None:
                d_products *= features.slope(products)
                weights = features.weigh(products)
                # Products are of the vectors themselves.
                left, right = keys[h], queries[h]
            weights = jnp.where(mask.allowed, weights, 0)
            return left, right, weights.astype(dtype), d_products.astype(dtype), *others

        def multiply_weights(h, weighed):
            left, right, weights, d_products, d_phi_q, d_phi_k, d_value = weighed
            to_query, to_key = dot(left, d_products, PLAIN), dot(right, d_products, LANES)
            return to_query, to_key, d_phi_q, d_phi_k, d_value + dot(d_sums[h], weights, LANES)

        def pull(h, multiplied):
            to_query, to_key, d_phi_q, d_phi_k, d_value = multiplied
            found[h] = (
                _pulled(features, queries[h], d_phi_q, to_query),
                _pulled(features, keys[h], d_phi_k, to_key),
                d_value[: -ones_rows(dtype)],
            )

        pipelined(heads, expand, multiply, weigh, multiply_weights, pull)
        for i, ref in enumerate((dq, dk, dv)):
            put(spec, ref, tokens, [found[h][i] for h in heads])

    for_each_chunk(spec, dtype, chunk, reverse=True)
    finish(carry, d_state)


def _pulled(features, vector, d_phi, through_weights):
    """Gradient of a query or key from that of its features, and from what came through the weights."""
    if features.weigh is None:
        return features.pull(wide(vector), d_phi + through_weights)
    return features.pull(wide(vector), d_phi) + through_weights


def _gradients_of_sums(spec, d_out, out, total, tokens) -> list[jax.Array]:
    """[E + ones, C] of each head, of out = numerator / total, or without `normalize` numerator / scale."""
    d_outputs, found = take(spec, d_out, tokens), []
    outputs = take(spec, out, tokens) if spec.normalize else None
    for h, d_output in enumerate(d_outputs):
        if spec.normalize:
            inverse = 1 / total[0, h, :, tokens]
            products = wide(d_output) * wide(outputs[h])
            d_total = -jnp.sum(products, axis=0, keepdims=True) * inverse
        else:
            inverse = 1 / spec.features.scale
            d_total = jnp.zeros((1, d_output.shape[1]), jnp.float32)
        d_numerator = (wide(d_output) * inverse).astype(d_output.dtype)
        d_total = first_row(d_total, d_output.dtype)
        found.append(jnp.concatenate([d_numerator, d_total], axis=0))
    return found
