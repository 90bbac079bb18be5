"""Attention to a cache in pure JAX: a loop over blocks of the cache with a running softmax.

The loop ends with the longest row of the batch, or with the window, so that its time is that of the cache in use and
not of the memory set apart for it. A block is read where it lies, in its own dtype; nothing as large as the cache is
made.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target

# Entries of k in a block, over all rows of the batch: the L2 caches of a CPU's cores, or enough to occupy a GPU.
BLOCK_ENTRIES = {"cpu": 2**18}
LARGE_BLOCK_ENTRIES = 2**23
# Below any logit, and finite: the difference of two of them is 0.
LOWEST = -1e30
# The index of a key that is in a block a second time: later than any query.
REPEATED = 2**30


def decode_attention(q, k_cache, v_cache, lengths, page_table, *, window, scale, logits_soft_cap):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`; see the package for the arguments."""
    batch, num_queries, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    rows = q.reshape(batch, num_queries, kv_heads, heads // kv_heads, dim)
    position = lengths[:, None] - num_queries + jnp.arange(num_queries, dtype=jnp.int32)
    first = jnp.zeros_like(lengths)
    if window is not None:
        first = jnp.maximum(position[:, 0] - window + 1, 0)
    read, block = _reader(k_cache, v_cache, page_table, first, window is not None)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def step(i, carry):
        out, total, highest = carry
        k, v, key = read(i)
        is_token = (key < lengths[:, None])[..., None, None]
        distance = position[:, :, None] - key[:, None]  # [B, Tq, keys]
        allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        logits = scale * jnp.einsum("bqngd,bknd->bnqgk", rows, k, preferred_element_type=dtype)
        if logits_soft_cap is not None:
            logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        logits = jnp.where(allowed[:, None, :, None], logits, -jnp.inf)
        now = jnp.maximum(highest, logits.max(axis=-1, keepdims=True))
        weights = jnp.exp(logits - now)
        rescale = jnp.exp(highest - now)
        # Behind a row's length the cache may hold NaN, which a weight of 0 does not remove.
        v = jnp.where(is_token, v, 0)
        weighted = jnp.einsum(
            "bnqgk,bknd->bnqgd", weights.astype(v.dtype), v, preferred_element_type=dtype
        )
        total = total * rescale + weights.sum(axis=-1, keepdims=True)
        return out * rescale + weighted, total, now

    shape = (batch, kv_heads, num_queries, heads // kv_heads)
    out = jnp.zeros_like(q, dtype, shape=(*shape, v_cache.shape[3]))
    total = jnp.zeros_like(q, dtype, shape=(*shape, 1))
    blocks = -(-jnp.max(lengths - first // block * block) // block)
    out, total, highest = jax.lax.fori_loop(0, blocks, step, (out, total, total + LOWEST))
    out = out / jnp.where(total == 0, 1, total)
    lse = highest + jnp.log(total)
    out, lse = (jnp.moveaxis(x, 1, 2).reshape(batch, num_queries, heads, -1) for x in (out, lse))
    return out.astype(v_cache.dtype), lse[..., 0]


def _reader(k_cache, v_cache, page_table, first, starts_differ: bool):
    """A function `i -> (k [B, keys, Hkv, D], v, key int32 [B or 1, keys])` for block i of each row, and its length.

    Blocks are counted from the one that holds the row's token `first` [B], which is 0 unless `starts_differ`.
    """
    batch = len(first)
    platform = target().platform
    entries = BLOCK_ENTRIES.get(platform, LARGE_BLOCK_ENTRIES)
    block = max(entries // (batch * k_cache.shape[2] * k_cache.shape[3]), 16)
    if page_table is None:
        size = k_cache.shape[1]
        block = min(block, size)
        offsets = jnp.arange(block, dtype=jnp.int32)

        def read(i):
            begin = (first // block + i) * block if starts_differ else i[None] * block
            # The last block begins early, where it repeats keys of the one before, so that it ends with the cache.
            start = jnp.minimum(begin, size - block)
            key = start[:, None] + offsets
            key = jnp.where(key < begin[:, None], REPEATED, key)
            return *(_slice(x, start, block) for x in (k_cache, v_cache)), key

        return read, block

    page_size = k_cache.shape[1]
    pages = min(max(block // page_size, 1), page_table.shape[1])
    block = pages * page_size
    offsets = jnp.arange(pages, dtype=jnp.int32)

    def read(i):
        page = (first[:, None] // block + i) * pages + offsets
        taken = jnp.take_along_axis(page_table, page, axis=1, mode="clip")
        k, v = (
            jnp.take(x, taken, axis=0, mode="clip").reshape(batch, block, *x.shape[2:])
            for x in (k_cache, v_cache)
        )
        key = page[..., None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
        return k, v, key.reshape(batch, block)

    return read, block


def _slice(x, start, length: int):
    """`length` entries of time of [B, S, Hkv, D] from `start`, int [1] for all rows or [B]."""
    if len(start) == 1:
        return jax.lax.dynamic_slice_in_dim(x, start[0], length, axis=1)
    return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, length))(x, start)
