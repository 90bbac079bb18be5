"""Attention in pure JAX: a loop over tiles with a running softmax, and FlashAttention-2's backward.

Memory is linear in time, tiles that the mask leaves empty are never visited, and only tiles that it cuts are masked
(Dao, "FlashAttention-2", arXiv 2307.08691, algorithms 1 and 2). These choices make it fast on a CPU:

- The logits of a tile lie transposed, [keys, rows]. Then the statistics of the rows broadcast along the minor axis,
  and the reductions run over the major one. The left operand of each of the seven matrix products is contiguous in
  the axis that it is contracted over, which a CPU multiplies up to twice as fast: keys and values are laid out both
  ways, once, and the outputs accumulate as [D, rows] and are turned once.
- A tile is as large as the caches: it holds all heads of as few rows of the batch as fill it, because a product of a
  few long blocks is up to three times as fast as that of many short ones. The rows follow one another, each with its
  copies of what it reads in the layouts of the products, which then are in the caches too.
- The queries are scaled, and not the logits: that is one pass over each tile less.
- Blocks are the leading axis of every array, so that a loop step takes one contiguous piece.

The rows of a tile are the queries of all heads that share a key head, so that grouped-query attention reads each
key once and never repeats it. Inside, q is [blocks, B, Hkv, rows, D], k is [blocks, B, Hkv, keys, D].
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.attention import visits
from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.kernels import Kernels, differentiable
from pallas_kernels.attention.mask import PADDING, Mask, Tokens
from pallas_kernels.blocks import largest_divisor

# Entries in a tile of logits, over all of its rows of the batch and heads: 2 MiB of float32.
TILE = 2**19
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 512
# Below any logit, and finite: the difference of two of them is 0.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static arguments of the op, whether its mask asks for tokens too, and the size of its tiles."""

    mask: Mask
    has_tokens: bool
    scale: float
    logits_soft_cap: float | None
    group: int
    batch: int
    q_block: int
    k_block: int

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.q_block, self.k_block)


def attention(
    q, k, v, queries: Tokens, keys: Tokens, *, mask: Mask, scale, logits_soft_cap, known=None
):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`, or `known`; see the package for the arguments."""
    batch, heads = q.shape[0], q.shape[2]
    if q.dtype == _accumulator(q.dtype):
        q, scale = scale * q, 1.0
    rows, (q_block, k_block) = _tile(batch, heads, mask)
    queries, keys = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), (queries, keys)
    )
    has_tokens, group = mask.takes_tokens(queries), heads // k.shape[2]
    spec = _Spec(mask, has_tokens, scale, logits_soft_cap, group, rows, q_block, k_block)
    return differentiable(_KERNELS, spec, q, k, v, queries, keys, known)


def _tile(batch: int, heads: int, mask: Mask) -> tuple[int, tuple[int, int]]:
    """Rows of the batch in a tile, and the lengths of its blocks of queries and keys.

    Only a CPU takes the rows one after the other; other devices have so many units that they need all of them at once.
    """
    in_turn = dispatch.target().platform == "cpu"
    longest = 2 ** round(math.log2(math.sqrt(TILE / (heads if in_turn else heads * batch))))
    if mask.window is not None:
        longest = min(longest, 2 ** math.ceil(math.log2(mask.window)))
    longest = min(max(longest, SMALLEST_BLOCK), LARGEST_BLOCK)
    q_block, k_block = (_block_length(n, longest) for n in (mask.num_queries, mask.num_keys))
    most = max(1, TILE // (heads * q_block * k_block)) if in_turn else batch
    return largest_divisor(batch, most), (q_block, k_block)


def _block_length(length: int, target: int) -> int:
    """Equal blocks of at most `target`, a multiple of 8 for the vector units."""
    num_blocks = -(-length // target)
    block = -(-length // num_blocks)
    return block if num_blocks == 1 else -(-block // 8) * 8


def _forward(spec, *arrays):
    return _over_batch(spec, functools.partial(_forward_rows, spec), *arrays)


def _forward_rows(spec, q, k, v, queries, keys):
    ranges = visits.ranges(visits.by_queries(spec.mask, spec.blocks, spec.has_tokens), axis="query")
    row_blocks = (_rows(spec, q), _row_tokens(spec, queries))
    k_blocks, vt_blocks = _keys(spec, k), _keys(spec, v).swapaxes(-1, -2)
    key_blocks = _key_tokens(spec, keys)
    dtype = _accumulator(q.dtype)

    def query_block(_, block):
        tiles, q, queries = block

        def key_block(j, carry, is_cut):
            out, total, highest = carry
            k, vt, keys = jax.tree.map(lambda x: x[j], (k_blocks, vt_blocks, key_blocks))
            logits = _logits(spec, q, k)
            if is_cut:
                logits = jnp.where(_allowed(spec, queries, keys), logits, -jnp.inf)
            new_highest = jnp.maximum(highest, logits.max(axis=-2, keepdims=True))
            weights = jnp.exp(logits - new_highest)
            rescale = jnp.exp(highest - new_highest)
            out = out * rescale + _dot("bndk,bnkr->bndr", vt, weights.astype(vt.dtype))
            return out, total * rescale + weights.sum(axis=-2, keepdims=True), new_highest

        shape = (*q.shape[:2], 1, q.shape[2])
        out = jnp.zeros_like(q, dtype, shape=(*shape[:2], vt_blocks.shape[-2], shape[3]))
        total = jnp.zeros_like(q, dtype, shape=shape)
        carry = (out, total, total + LOWEST)
        out, total, highest = _over_tiles(ranges, tiles, key_block, carry)
        return None, (out / jnp.where(total == 0, 1, total), highest + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, (ranges, *row_blocks))
    out = _from_rows(spec, out).astype(v.dtype)
    lse = _from_rows(spec, lse)[..., 0]
    return out, lse


def _backward(spec, saved, cotangents):
    return _over_batch(spec, functools.partial(_backward_rows, spec), *saved, *cotangents)


def _backward_rows(spec, q, k, v, queries, keys, out, lse, d_out, d_lse):
    dtype = lse.dtype
    # d logits = weights * (d_out vᵀ - delta) with delta = d_out · out (Dao 2023, section 2.3.2); the gradient of the
    # log-sum-exp is the weights themselves. A row that sees nothing passes no gradient.
    empty = jnp.isneginf(lse)
    delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_lse
    row_blocks = (
        _rows(spec, q),
        _rows(spec, d_out.astype(v.dtype)),
        _row_statistic(spec, jnp.where(empty, 0, lse)),
        _row_statistic(spec, jnp.where(empty, 0, delta)),
        _row_tokens(spec, queries),
    )
    ranges = visits.ranges(visits.by_keys(spec.mask, spec.blocks, spec.has_tokens), axis="key")
    k_blocks, v_blocks = _keys(spec, k), _keys(spec, v)
    blocks = (k_blocks, k_blocks.swapaxes(-1, -2), v_blocks, _key_tokens(spec, keys))

    def key_block(dq_blocks, block):
        tiles, k, *others = block

        def query_block(i, carry, is_cut):
            dq_blocks, dk, dv = carry
            rows = jax.tree.map(lambda x: x[i], row_blocks)
            dq_tile, dk_tile, dv_tile = _tile_backward(spec, rows, k, *others, is_cut)
            dq_blocks = jax.lax.dynamic_update_index_in_dim(
                dq_blocks, dq_blocks[i] + dq_tile, i, axis=0
            )
            return dq_blocks, dk + dk_tile, dv + dv_tile

        carry = (dq_blocks, jnp.zeros_like(k, dtype), jnp.zeros_like(others[1], dtype))
        dq_blocks, dk, dv = _over_tiles(ranges, tiles, query_block, carry)
        return dq_blocks, (dk, dv)

    dq = jnp.zeros_like(row_blocks[0].swapaxes(-1, -2), dtype)
    dq, (dk, dv) = jax.lax.scan(key_block, dq, (ranges, *blocks))
    dq = _from_rows(spec, dq).astype(q.dtype)
    dk = _from_keys(spec, dk).astype(k.dtype)
    dv = _from_keys(spec, dv).astype(v.dtype)
    return dq, dk, dv


_KERNELS = Kernels(_forward, _backward)


# One tile.


def _tile_backward(spec, rows, k, kt, v, keys, is_cut):
    """What one tile adds to the gradients: dq [B, Hkv, D, rows], dk and dv [B, Hkv, keys, D]."""
    q, d_out, lse, delta, queries = rows
    logits = _logits(spec, q, k)
    weights = jnp.exp(logits - lse)
    if is_cut:
        weights = jnp.where(_allowed(spec, queries, keys), weights, 0)
    d_weights = _dot("bnkd,bnrd->bnkr", v, d_out)
    d_logits = spec.scale * weights * (d_weights - delta)
    if spec.logits_soft_cap is not None:
        # d tanh(x) = 1 - tanh(x)²
        d_logits *= 1 - jnp.square(logits / spec.logits_soft_cap)
    d_logits = d_logits.astype(k.dtype)
    dq = _dot("bndk,bnkr->bndr", kt, d_logits)
    dk = _dot("bnkr,bnrd->bnkd", d_logits, q)
    dv = _dot("bnkr,bnrd->bnkd", weights.astype(v.dtype), d_out)
    return dq, dk, dv


def _logits(spec, q, k):
    """Logits [B, Hkv, keys, rows] before the mask."""
    logits = spec.scale * _dot("bnkd,bnrd->bnkr", k, q)
    if spec.logits_soft_cap is None:
        return logits
    return spec.logits_soft_cap * jnp.tanh(logits / spec.logits_soft_cap)


def _allowed(spec, queries: Tokens, keys: Tokens):
    return spec.mask.allowed(queries.as_columns(), keys.as_rows())[:, None]


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=_accumulator(x.dtype))


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


# Blocks.


def _over_batch(spec, function, *arrays):
    """`function` of all the arrays, of `spec.batch` rows of the batch at a time."""
    batch = arrays[0].shape[0]
    if spec.batch == batch:
        return function(*arrays)
    parts = jax.tree.map(lambda x: x.reshape(-1, spec.batch, *x.shape[1:]), arrays)
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def _over_tiles(ranges: np.ndarray, tiles, step, carry):
    """Runs `step(tile, carry, is_cut)` over the tiles of one row of `ranges`, masked only where the mask cuts them."""
    for part, is_cut in enumerate((True, False, True)):
        if (ranges[:, part] < ranges[:, part + 1]).any():
            bounds = tiles[part], tiles[part + 1]
            carry = jax.lax.fori_loop(*bounds, functools.partial(step, is_cut=is_cut), carry)
    return carry


def _split(x, axis: int, block: int, fill=0):
    """[..., T, ...] -> [..., blocks, block, ...], padded with `fill`."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def _rows(spec, x):
    """[B, Tq, H, D] -> [blocks, B, Hkv, rows, D]: the rows of a block are its queries of each head of the group."""
    x = _split(x, 1, spec.q_block)
    x = x.reshape(*x.shape[:3], -1, spec.group, x.shape[-1])
    x = x.transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _from_rows(spec, x):
    """[blocks, B, Hkv, D, rows] -> [B, Tq, H, D]."""
    blocks, batch, heads, dim, _ = x.shape
    x = x.reshape(blocks, batch, heads, dim, spec.group, spec.q_block).transpose(1, 0, 5, 2, 4, 3)
    return x.reshape(batch, -1, heads * spec.group, dim)[:, : spec.mask.num_queries]


def _row_statistic(spec, x):
    """[B, Tq, H] -> [blocks, B, Hkv, 1, rows]."""
    return _rows(spec, x[..., None]).swapaxes(-1, -2)


def _row_tokens(spec, queries: Tokens) -> Tokens:
    """[B, Tq] -> [blocks, B, rows]."""
    return jax.tree.map(
        lambda x: jnp.tile(_split(x, 1, spec.q_block).swapaxes(0, 1), spec.group), queries
    )


def _keys(spec, x):
    """[B, Tk, Hkv, D] -> [blocks, B, Hkv, keys, D]."""
    return _split(x, 1, spec.k_block).transpose(1, 0, 3, 2, 4)


def _from_keys(spec, x):
    """[blocks, B, Hkv, keys, D] -> [B, Tk, Hkv, D]."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : spec.mask.num_keys]


def _key_tokens(spec, keys: Tokens) -> Tokens:
    """[B, Tk] -> [blocks, B, keys]."""
    position = _split(keys.position, 1, spec.k_block, PADDING).swapaxes(0, 1)
    segment = keys.segment
    return Tokens(
        position, None if segment is None else _split(segment, 1, spec.k_block).swapaxes(0, 1)
    )
