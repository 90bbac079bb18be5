"""Causal attention beside `jax.nn.dot_product_attention`, and on TPU beside jax's flash and splash attention."""

import functools
import re

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from benchmarks.kernels.case import BOTH, FORWARD, Case, Contender, implementations
from benchmarks.kernels.roofline import Product, Work
from pallas_kernels import OPS, attention

# Tiles of the peers' kernels: by default flash attention takes 128, which wastes most of a matrix unit's time.
_PEER_BLOCK = 512


def attention_cases(quick: bool) -> list[Case]:
    """A small model's training batch, a longer context, and the same with heads as wide as the matrix unit."""
    shapes = [(8, 256, 6, 64), (2, 2048, 8, 64), (2, 2048, 8, 128)]
    return [_case(*shape) for shape in shapes[: 1 if quick else None]]


def _case(batch: int, time: int, heads: int, dim: int) -> Case:
    def make_inputs(key, dtype):
        keys = jax.random.split(key, 3)
        shape = (batch, time, heads, dim)
        return {
            name: jax.random.normal(k, shape, dtype) for name, k in zip("qkv", keys, strict=True)
        }

    tiles = causal_tiles(time, min(_PEER_BLOCK, time)) * batch * heads
    on_tpu = functools.partial(
        Contender,
        platforms=("tpu",),
        has_schedule=True,
        steps=lambda kernel: tiles if re.search("flash|splash", kernel.name) else None,
    )
    # A query sees (T + 1) / 2 keys on average. Forward: q kᵀ and the product with v; of a pair maximum, difference,
    # exponential and sum. Backward: q kᵀ again and the gradient of the weights, dv, dq and dk; of a pair again the
    # difference and the exponential, and of the gradient of its weight a difference and a product.
    seen = batch * heads * (time + 1) / (2 * time)
    of_pairs = Work(products=(Product(time, dim, time, seen),))
    to_tokens = Work(products=(Product(time, time, dim, seen),))
    pair = Work(exponentials=time**2 * seen)
    flop = Work(vector_flops=time**2 * seen)
    forward = of_pairs + to_tokens + pair + flop.times(3)
    backward = of_pairs.times(2) + to_tokens.times(3) + pair + flop.times(3)
    return Case(
        op="attention",
        shape=f"[{batch}, {time}, {heads}, {dim}] causal",
        make_inputs=make_inputs,
        contenders=(
            *implementations(attention, OPS["attention"]),
            Contender(
                "jax.nn",
                _dot_product_attention,
                has_schedule=True,
            ),
            on_tpu("jax flash", _flash_attention),
            on_tpu("jax splash", _splash_attention),
        ),
        work={FORWARD: (forward,), BOTH: (forward + backward,)},
    )


def causal_tiles(time: int, block: int) -> int:
    """Square tiles of a causal T x T matrix that hold a pair which is allowed."""
    rows = -(-time // block)
    return rows * (rows + 1) // 2


def _dot_product_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


# Both kernels take heads before time.
def _flash_attention(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    block = min(_PEER_BLOCK, q.shape[2])
    names = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv")
    names += ("block_k_dkv", "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")
    sizes = flash.BlockSizes(**dict.fromkeys(names, block), block_b=1)
    scale = q.shape[3] ** -0.5
    out = flash.flash_attention(q, k, v, causal=True, sm_scale=scale, block_sizes=sizes)
    return out.swapaxes(1, 2)


def _splash_attention(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    heads, time, dim = q.shape[1:]
    block = min(_PEER_BLOCK, time)
    names = ("block_q", "block_kv", "block_kv_compute")
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True)
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((time, time))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel)(q * dim**-0.5, k, v).swapaxes(1, 2)
