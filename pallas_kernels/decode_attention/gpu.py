"""Attention to a cache for NVIDIA Hopper (Pallas, Mosaic GPU): the cache is read once, at the pace of the memory.

Flash-Decoding (Dao et al., 2023, crfm.stanford.edu): a row's cache is divided into parts, whose softmaxes are merged
by their log-sum-exps.

The queries of a key head's group, few as they are, are the 64 rows that `wgmma` takes at least. Most of these are no
queries; yet on an H100 (128 entries of a head, bfloat16) the two products of a tile take a quarter of the time in which
its keys and values arrive. With keys as the rows the products would be shorter, but each maximum and each sum over the
keys would pass through all warps; here they are within four threads that lie together.

Nothing as large as the cache is made, so that its heads have to be whole rows of shared memory, and the tile at its end
begins early instead of being padded: the keys that it has a second time are masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention.gpu_tile import Softmax, logits_and_factor
from pallas_kernels.decode_attention.gpu_parts import (
    ALIGNMENT,
    Part,
    Spec,
    half_tile,
    make_spec,
    part_of,
)
from pallas_kernels.decode_attention.merge import merge
from pallas_kernels.hopper import ROWS, WARPGROUPS

LARGEST_HEAD_DIM = 128
# Entries of a head: 32 bytes, the narrowest rows of shared memory that `wgmma` reads.
HEAD_MULTIPLE = 16


def refuses(
    q, k_cache, v_cache, lengths, page_table, *, window, scale, logits_soft_cap
) -> str | None:
    """What the kernel cannot do with these arguments or on this GPU, or None."""
    if q.dtype != jnp.bfloat16:
        return f"dtype {q.dtype}; it takes bfloat16"
    for dim in (q.shape[3], v_cache.shape[3]):
        if dim > LARGEST_HEAD_DIM or dim % HEAD_MULTIPLE:
            return (
                f"head_dim {dim}: it would have to copy the cache; without it takes multiples of {HEAD_MULTIPLE} "
                f"up to {LARGEST_HEAD_DIM}"
            )
    size = k_cache.shape[1]
    if page_table is None and size % ALIGNMENT and size > half_tile(q.shape[3], v_cache.shape[3]):
        return f"a cache of {size} tokens: it would have to copy it; without it takes multiples of {ALIGNMENT}"
    if page_table is not None and not (size in (8, 16, 32, 64) or size % 128 == 0):
        return f"pages of {size} keys; it takes pages of 8, 16, 32, 64 and multiples of 128"
    return hopper.refuses_device()


def decode_attention(
    q,
    k_cache,
    v_cache,
    lengths,
    page_table,
    *,
    window,
    scale,
    logits_soft_cap,
    interpret=False,
):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`; see the package for the arguments.

    `interpret`: True or a `plgpu.InterpretGPUParams` to run without a GPU. The interpreter has side effects, with which
    JAX refuses `jax.shard_map`; the compiled kernel has none.
    """
    options = {"window": window, "scale": scale, "logits_soft_cap": logits_soft_cap}
    spec = make_spec(
        q, k_cache, v_cache, page_table, interpret=hopper.interpreter(interpret), **options
    )
    if page_table is None and spec.size < spec.half:  # What a copy takes at once.
        missing = [(0, 0), (0, spec.half - spec.size), (0, 0), (0, 0)]
        k_cache, v_cache = (jnp.pad(x, missing) for x in (k_cache, v_cache))
    tables = (lengths,) if page_table is None else (lengths, page_table)
    out, lse = _call(spec, tables, _to_rows(spec, q), k_cache, v_cache)
    lse = lse[..., : spec.rows].reshape(*out.shape[:3], 1)
    out, lse = (_from_rows(spec, x, q.shape[2]) for x in merge(out, lse))
    return out.astype(v_cache.dtype), lse[..., 0]


def _to_rows(spec: Spec, q):
    """[B, Tq, H, D] -> [B, Hkv x rows, D]: queries times the heads of a group, padded to whole blocks."""
    batch, num_queries, heads, dim = q.shape
    q = q.reshape(batch, num_queries, heads // spec.group, spec.group, dim).swapaxes(1, 2)
    q = q.reshape(batch, heads // spec.group, -1, dim)
    missing = spec.row_blocks * spec.rows - q.shape[2]
    return jnp.pad(q, [(0, 0), (0, 0), (0, missing), (0, 0)]).reshape(batch, -1, dim)


def _from_rows(spec: Spec, x, heads: int):
    """[B, Hkv x rows, width] -> [B, Tq, H, width]."""
    batch, _, width = x.shape
    kv_heads, num_rows = heads // spec.group, spec.num_queries * spec.group
    x = x.reshape(batch, kv_heads, -1, width)[:, :, :num_rows]
    x = x.reshape(batch, kv_heads, spec.num_queries, spec.group, width).swapaxes(1, 2)
    return x.reshape(batch, spec.num_queries, heads, width)


def _call(spec: Spec, tables, q, k_cache, v_cache):
    """Softmaxes of the parts: out [B, parts, Hkv x rows, Dv] and lse [B, parts, Hkv x row blocks, ROWS]."""
    batch, num_rows, dim = q.shape
    kv_heads, value_dim = v_cache.shape[2:]
    parts = WARPGROUPS * spec.parts
    dtype = q.dtype
    tiles = [
        plgpu.SMEM((hopper.STAGES, WARPGROUPS, spec.half, width), dtype)
        for width in (dim, value_dim)
    ]
    copies = len(tiles) * spec.keys // spec.copy
    return hopper.call(
        functools.partial(_kernel, spec, len(tables)),
        (*tables, q, k_cache, v_cache),
        out=(
            ((batch, parts, num_rows, value_dim), jnp.float32),
            ((batch, parts, kv_heads * spec.row_blocks, ROWS), jnp.float32),
        ),
        scratch=(
            plgpu.SMEM((ROWS, dim), dtype),
            plgpu.Barrier(),
            plgpu.SMEM((WARPGROUPS, ROWS, value_dim), jnp.float32),
            hopper.Ring(
                tuple(tiles),
                plgpu.Barrier(num_arrivals=copies, num_barriers=hopper.STAGES),
                plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=hopper.STAGES),
            ),
        ),
        # The heads of a key lie together in memory, and are read together.
        grid={"batch": batch, "part": spec.parts, "head": kv_heads, "block": spec.row_blocks},
        interpret=spec.interpret,
        name="decode_attention",
    )


def _kernel(spec: Spec, num_tables: int, *refs):
    """A block: q [rows, D] of a key head, part of k [S, D], v [S, Dv] -> out [rows, Dv], lse [ROWS] of each half."""
    (lengths, *page_table), refs = refs[:num_tables], refs[num_tables:]
    q, k, v, out, lse, q_tile, q_filled, out_tiles, ring = refs
    batch, index, head, block = (
        jax.lax.axis_index(name) for name in ("batch", "part", "head", "block")
    )
    part = part_of(spec, lengths[batch], index)
    block_of_head = head * spec.row_blocks + block
    rows = pl.ds(block_of_head * spec.rows, spec.rows)
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        # What the rows behind them in shared memory hold gives rows that nobody reads.
        plgpu.copy_gmem_to_smem(q.at[batch, rows], q_tile.at[pl.ds(0, spec.rows)], q_filled)

    tiles = _start(spec, part, ring, (k, v), batch, head, *page_table)

    out_tile = out_tiles.at[warpgroup]
    plgpu.barrier_wait(q_filled)

    def accumulate(i, pieces, softmax):
        k_tile, v_tile = (piece.at[warpgroup] for piece in pieces)
        own = part.start + i * spec.keys + warpgroup * spec.half
        start = _start_of_copy(spec, own)
        logits, factor = logits_and_factor(spec, hopper.product(q_tile, k_tile.T))
        logits = _hide(spec, part, logits, v_tile, block, own, start)
        return softmax.add(logits, factor, v_tile, spec.interpret)

    own_part = index * WARPGROUPS + warpgroup
    softmax = tiles.fold(accumulate, Softmax.of_nothing(v.shape[3]))
    values, lse[batch, own_part, block_of_head] = softmax.result()
    hopper.stage((values, out_tile))
    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, spec.rows)], out.at[batch, own_part, rows])
    plgpu.wait_smem_to_gmem(0)


def _hide(spec: Spec, part: Part, logits, v_tile, block, own, start):
    """Logits [ROWS, keys] with -inf where a query does not see a key; in `v_tile`, 0 where the cache may hold anything.

    Args:
        spec: the specification.
        part: what the block reads.
        logits: of a half tile.
        v_tile: its values, in shared memory.
        block: index of the block of rows.
        own: the first token that is not in another half tile already.
        start: the first token of the half tile.
    """
    token = functools.partial(plgpu.broadcasted_iota, jnp.int32, layout=plgpu.Layout.WGMMA)
    all_see_all = (start == own) & (start + spec.half <= part.length - (spec.num_queries - 1))
    if spec.window is not None:
        all_see_all &= start >= part.length - spec.window

    def mask(logits):
        key = token(logits.shape, 1) + start
        query = jax.lax.div(token(logits.shape, 0) + block * spec.rows, spec.group)
        query += part.length - spec.num_queries
        seen = (key >= own) & (key <= query)
        if spec.window is not None:
            seen &= query - key < spec.window
        return jnp.where(seen, logits, -jnp.inf)

    @pl.when(~all_see_all)
    def _():
        # A weight of 0 does not remove NaN.
        key = token(v_tile.shape, 0) + start
        v = plgpu.load(v_tile, layout=plgpu.Layout.WGMMA)
        v_tile[...] = jnp.where(key < part.length, v, jnp.zeros_like(v))
        plgpu.commit_smem()

    return jax.lax.cond(all_see_all, lambda logits: logits, mask, logits)


def _start_of_copy(spec: Spec, token):
    """Where a copy of `half` keys without pages begins: where the cache ends before the copy would, early."""
    return (
        token if spec.page_size is not None else jnp.minimum(token, max(spec.size - spec.half, 0))
    )


def _start(spec: Spec, part: Part, ring, caches, batch, head, page_table=None) -> hopper.Tiles:
    """The part's tiles of a key head of k and v, each copied in pieces of `copy` keys."""
    offsets = [(w, i) for w in range(WARPGROUPS) for i in range(0, spec.half, spec.copy)]

    def place(token):
        if page_table is None:
            return batch, pl.multiple_of(_start_of_copy(spec, token), ALIGNMENT)
        # Pages behind the row's length may not be there: the last one takes their place, and its keys are masked.
        page = jax.lax.div(jnp.minimum(token, part.length - 1), spec.page_size)
        return page_table[batch, page], pl.multiple_of(
            jax.lax.rem(token, spec.page_size), ALIGNMENT
        )

    def pieces(i):
        start = part.start + i * spec.keys
        # All reads of the page table before the first copy, so that they do not wait for each other.
        places = [place(start + w * spec.half + i) for w, i in offsets]
        return [x.at[row, pl.ds(first, spec.copy), head] for x in caches for row, first in places]

    into = [buffer.at[:, w, pl.ds(i, spec.copy)] for buffer in ring.buffers for w, i in offsets]
    return ring.start(part.num_tiles, pieces, into)
