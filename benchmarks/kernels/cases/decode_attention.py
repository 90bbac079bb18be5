"""One new token against a full cache, beside `jax.nn.dot_product_attention` told the lengths."""

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import FORWARD, Case, Contender, implementations
from benchmarks.kernels.roofline import Product, Work
from pallas_kernels import OPS, decode_attention


def decode_attention_cases(quick: bool) -> list[Case]:
    """Grouped-query decoding over a short and a long cache."""
    shapes = [(8, 1024, 8, 2, 128), (8, 8192, 8, 2, 128)]
    return [_case(*shape) for shape in shapes[: 1 if quick else None]]


def _case(batch: int, cache: int, heads: int, kv_heads: int, dim: int) -> Case:
    def make_inputs(key, dtype):
        keys = jax.random.split(key, 3)
        return {
            "q": jax.random.normal(keys[0], (batch, 1, heads, dim), dtype),
            "k_cache": jax.random.normal(keys[1], (batch, cache, kv_heads, dim), dtype),
            "v_cache": jax.random.normal(keys[2], (batch, cache, kv_heads, dim), dtype),
            "lengths": jnp.full((batch,), cache, jnp.int32),
        }

    # Of the heads that share one of the cache: q kᵀ and the product with v; of a pair maximum, difference and sum.
    group, pairs = heads // kv_heads, batch * heads * cache
    products = Product(group, dim, cache), Product(group, cache, dim)
    work = Work(products).times(batch * kv_heads)
    work += Work(vector_flops=3 * pairs, exponentials=pairs)
    return Case(
        op="decode_attention",
        shape=f"[{batch}, 1, {heads}, {dim}], cache {cache} of {kv_heads} heads",
        make_inputs=make_inputs,
        stored=("k_cache", "v_cache"),
        contenders=(
            *implementations(decode_attention, OPS["decode_attention"]),
            Contender("jax.nn", _dot_product_attention, has_schedule=True),
        ),
        work={FORWARD: (work,)},
    )


def _dot_product_attention(q, k_cache, v_cache, lengths):
    return jax.nn.dot_product_attention(q, k_cache, v_cache, key_value_seq_lengths=lengths)
