"""Attention for NVIDIA Hopper (Pallas, Mosaic GPU): the forward kernel.

Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1, with two warpgroups (Shah et al., "FlashAttention-3", arXiv
2407.08608, section 3.1): while one of the two is at its exponentials, the tensor cores are free for the products of the
other. They are also at work for the same one (section 3.2): the logits of the next tile are multiplied meanwhile, so
that a tile of the ring consists of the values of a tile of keys and of the keys of the next one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention import gpu_backward, gpu_tile, visits
from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.gpu_tile import BLOCK, LARGEST_HEAD_DIM, Spec
from pallas_kernels.attention.kernels import Kernels, differentiable
from pallas_kernels.attention.mask import Mask, Tokens
from pallas_kernels.hopper import ROWS, WARPGROUPS

# Keys of a tile: two tiles of k and of v, the first one of k and the queries are 192 KiB of shared memory at the
# largest head; the registers hold the logits of two tiles.
KEYS = 128


def refuses(q, k, v, queries, keys, *, mask, scale, logits_soft_cap) -> str | None:
    """What the kernel cannot do with these arguments or on this GPU, or None."""
    if q.dtype != jnp.bfloat16:
        return f"dtype {q.dtype}; it takes bfloat16"
    head_dim = max(q.shape[3], v.shape[3])
    if head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {head_dim}; it takes up to {LARGEST_HEAD_DIM}"
    return hopper.refuses_device()


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
    known=None,
    interpret=False,
):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`, or `known`; see the package for the arguments.

    `interpret`: True or a `plgpu.InterpretGPUParams` to run without a GPU. The interpreter has side effects, with which
    JAX refuses `jax.checkpoint` and `jax.shard_map`; the compiled kernel has none.
    """
    has_tokens = mask.takes_tokens(queries)
    spec = Spec(mask, scale, logits_soft_cap, has_tokens, hopper.interpreter(interpret))
    return differentiable(_KERNELS, spec, q, k, v, queries, keys, known)


def _out_and_lse(spec, q, k, v, queries, keys):
    tokens = gpu_tile.token_arrays(spec, queries, keys, BLOCK, KEYS)
    width = gpu_tile.width(q, v)
    padded_q = gpu_tile.pad_heads(q, BLOCK, width)
    padded_k, padded_v = (gpu_tile.pad_heads(x, KEYS, width) for x in (k, v))
    batch, length, heads, _ = padded_q.shape
    table = visits.ranges(
        visits.by_queries(spec.mask, Blocks(BLOCK, KEYS), spec.has_tokens), axis="query"
    )
    # The last tile is walked apart from the others: there is one, also where nothing is seen.
    table[:, 3] = np.maximum(table[:, 3], table[:, 0] + 1)
    out, lse = hopper.call(
        functools.partial(_kernel, spec),
        (table, padded_q, padded_k, padded_v, *tokens),
        out=(
            (padded_q.shape, v.dtype),
            ((batch, heads, length), jnp.float32),
        ),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, width), q.dtype),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.SMEM((KEYS, width), k.dtype),
            plgpu.Barrier(),
            gpu_tile.key_ring(padded_k, padded_v, tokens, KEYS),
        ),
        grid=gpu_tile.grid(batch, heads, length),
        interpret=spec.interpret,
        name="attention_forward",
    )
    out = out[:, : q.shape[1], :, : v.shape[3]]
    lse = lse[:, :, : q.shape[1]].swapaxes(1, 2)
    return out, lse


_KERNELS = Kernels(_out_and_lse, gpu_backward.backward)


def _kernel(spec: Spec, table, q, k, v, *rest):
    """A block: the queries [BLOCK, D] of a head, k [Tk, D], v [Tk, Dv] -> out [BLOCK, Dv], lse [BLOCK]."""
    *tokens, out, lse, q_tiles, q_filled, first_k, first_filled, ring = rest
    batch, head, index = (jax.lax.axis_index(name) for name in gpu_tile.AXES)
    # Causal rows are the longer the later they are, and the longest begin first.
    block = table.shape[0] - 1 - index
    visited = gpu_tile.load_visited(table, block)
    warpgroup = jax.lax.axis_index("warpgroup")
    tiles = gpu_tile.start_keys(ring, visited, q, k, v, tokens, batch, head, KEYS, ahead=1)

    start = block * BLOCK + warpgroup * ROWS
    rows = pl.ds(start, ROWS)
    q_tile = q_tiles.at[warpgroup]
    plgpu.copy_gmem_to_smem(q.at[batch, rows, head], q_tile, q_filled.at[warpgroup])

    @pl.when(tiles.copies)
    def _():
        keys = gpu_tile.keys_of(k, q, batch, head, visited.first, KEYS)
        plgpu.copy_gmem_to_smem(keys, first_k, first_filled)

    query = start
    if tokens:
        query = gpu_tile.load_tokens(gpu_tile.of_batch(tokens[0], batch, start, ROWS), 0)
    plgpu.barrier_wait(q_filled.at[warpgroup])
    plgpu.barrier_wait(first_filled)

    def add(i, pieces, carry):
        products, softmax = carry
        _, v_tile, *key_tokens = pieces
        tile = visited.first + i
        key = gpu_tile.load_tokens(key_tokens[0], 1) if tokens else tile * KEYS
        logits, factor = gpu_tile.logits_and_factor(spec, products)
        logits = gpu_tile.where_allowed(
            spec, logits, -jnp.inf, query, key, visited.is_full(tile), queries_axis=0
        )
        return softmax.add(logits, factor, v_tile, spec.interpret)

    def add_and_multiply(i, pieces, carry):
        def overlapped(next_products):
            plgpu.wgmma(next_products, q_tile, pieces[0].T)
            softmax = add(i, pieces, carry)
            return next_products[...], softmax

        return pl.run_scoped(overlapped, plgpu.ACC((ROWS, KEYS), jnp.float32))

    carry = hopper.product(q_tile, first_k.T), gpu_tile.Softmax.of_nothing(v.shape[3])
    values, lse[batch, head, rows] = tiles.fold(add_and_multiply, carry, last=add).result()
    hopper.write_tile(values, q_tile, out.at[batch, rows, head])
