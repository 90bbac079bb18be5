"""Attention to a cache for TPU (Pallas, Mosaic): the cache is read once, at the pace of the memory.

The rows of the matrix products are all queries of all heads, and the columns all keys of all key heads as they lie in
memory, [keys x Hkv, D]: no head is picked out of the cache and nothing is copied. The logits of a query with the keys
of other heads are masked. They cost nothing that shows: whichever heads meet, a tile of the cache has to be pushed into
the matrix unit once, and that takes less time than to read it.

A visit reads a few pages; without a page table a page is a block of the row's cache, and where that is the whole of a
short one, a visit is to a few rows of the batch, whose waits fill each other. The pages behind a row's length,
and those before its window, are not read: the index maps, which see the lengths in scalar memory, stay on the last page
that counts, and the copy of a block that did not change is left out. Each page has a copy of its own, which the scalar
unit starts: by its static schedule on v5e that keeps the pace of the memory from pages of about 64 KiB on.

The kernel reads a cache in the row-major layout. Where XLA chose another for an argument of the program, as it does for
head_dim < 128, it copies the cache on entry; a cache that a loop carries is copied once, before the loop.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_tile import LOG2_E, dot
from pallas_kernels.blocks import largest_divisor
from pallas_kernels.chips import num_cores
from pallas_kernels.decode_attention.merge import merge
from pallas_kernels.dispatch import target
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import interpreter, shaped_like

# Of k a visit: long beside the cost of a grid step, and its logits and buffers fit in VMEM.
VISIT_BYTES = 2**20
LOGITS_BYTES = 2**21
# What one page may have at most.
MOST_LOGITS_BYTES, MOST_PAGE_ENTRIES = 2**22, 2**19
VMEM_LIMIT = 16 * 2**20
# A page is one block of a visit, with a copy of its own; of short caches a visit has so many rows at most.
MOST_PAGES = 16
LARGEST_HEAD_DIM = 512
# Of the queries of all heads in a visit.
MOST_QUERY_ENTRIES = 2**17
# The page table lies in scalar memory.
LARGEST_PAGE_TABLE = 2**17
# Below any logit, and finite: the difference of two of them is 0.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static arguments of the kernel.

    Attributes:
        num_queries: Tq.
        heads: H.
        kv_heads: Hkv.
        page_size: keys of a page.
        max_pages: pages of a row.
        pages: of a visit.
        batch_rows: rows of the batch of a visit; more than one only where each has a single page.
        splits: parts of a row's cache, whose softmaxes are merged at the end.
        visits: of a split.
        window: width of the sliding window, or None.
        scale: factor on the logits.
        logits_soft_cap: c of c tanh(logits / c), or None.
    """

    num_queries: int
    heads: int
    kv_heads: int
    page_size: int
    max_pages: int
    pages: int
    batch_rows: int
    splits: int
    visits: int
    window: int | None
    scale: float
    logits_soft_cap: float | None


def refuses(
    q, k_cache, v_cache, lengths, page_table, *, window, scale, logits_soft_cap
) -> str | None:
    """What the kernel cannot do with these arguments, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {q.dtype}; it takes bfloat16 and float32"
    head_dim = max(q.shape[3], v_cache.shape[3])
    if head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {head_dim}; it takes up to {LARGEST_HEAD_DIM}"
    rows = q.shape[1] * q.shape[2]
    largest = MOST_QUERY_ENTRIES // _padded(head_dim)
    if rows > largest:
        return f"{q.shape[1]} queries of {q.shape[2]} heads of {head_dim}; it takes up to {largest} of all heads"
    kv_heads = k_cache.shape[2]
    if kv_heads % 8 and not (kv_heads == 1 or (kv_heads in (2, 4) and head_dim <= 128)):
        return (
            f"{kv_heads} key heads of {head_dim}: it would have to copy the cache; without it takes "
            "1 or 8n key heads, and 2 or 4 where head_dim <= 128"
        )
    spec = _make_spec(q, k_cache, page_table, window, scale, logits_soft_cap)
    columns = spec.page_size * kv_heads
    if columns * 4 * rows > MOST_LOGITS_BYTES or columns * _padded(head_dim) > MOST_PAGE_ENTRIES:
        return f"{rows} rows and pages of {spec.page_size} keys of {kv_heads} heads; they do not fit in VMEM"
    if page_table is not None and page_table.size > LARGEST_PAGE_TABLE:
        return f"a page table of {page_table.size} entries; it takes up to {LARGEST_PAGE_TABLE}"
    return None


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
    interpret: Any = False,
):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`; see the package for the arguments.

    `interpret` is what `pallas_call` takes: True or a `pltpu.InterpretParams` to run without a TPU.
    """
    batch, num_queries, heads, dim = q.shape
    spec = _make_spec(q, k_cache, page_table, window, scale, logits_soft_cap)
    # On TPU these reshapes move nothing.
    rows = q.reshape(batch, num_queries * heads, dim)
    k, v = (x.reshape(x.shape[0], -1, x.shape[3]) for x in (k_cache, v_cache))
    prefetched = _page_bounds(spec, lengths)
    if page_table is not None:
        # An empty row stays on its first page, and has none.
        page_table = jnp.where(lengths[:, None] == 0, 0, page_table)
        prefetched += (page_table.reshape(-1),)
    out, lse = _call(spec, prefetched, rows, k, v, interpret)
    out, lse = merge(out, lse)
    shape = (batch, num_queries, heads)
    return out.reshape(*shape, -1).astype(v_cache.dtype), lse.reshape(shape)


def _make_spec(q, k_cache, page_table, window, scale, logits_soft_cap) -> _Spec:
    batch, num_queries, heads, _ = q.shape
    _, size, kv_heads, dim = k_cache.shape
    key_bytes = kv_heads * _padded(dim) * q.dtype.itemsize
    logits_bytes = 4 * num_queries * heads * kv_heads
    keys = max(min(VISIT_BYTES // key_bytes, LOGITS_BYTES // logits_bytes), 1)
    if page_table is None:
        # A multiple of the 16 rows that a vector register of bfloat16 has, whatever Hkv is.
        page_size, pages = min(max(keys // 16 * 16, 16), size), 1
        max_pages = -(-size // page_size)
    else:
        page_size, max_pages = size, page_table.shape[1]
        pages = min(max(keys // page_size, 1), max_pages, MOST_PAGES)
    reach = max_pages
    if window is not None:
        # Tokens that follow each other touch one page more than they fill.
        reach = min(reach, -(-(window + num_queries - 1) // page_size) + 1)
    cores = num_cores(target().device_kind)
    splits = 1 if batch % cores == 0 else cores
    batch_rows = 1
    if page_table is None and max_pages == 1:
        # Each core still has a visit.
        query_entries = num_queries * heads * _padded(dim)
        most = min(keys // page_size, batch // cores, MOST_QUERY_ENTRIES // query_entries)
        batch_rows = largest_divisor(batch, min(most, MOST_PAGES))
    return _Spec(
        num_queries=num_queries,
        heads=heads,
        kv_heads=kv_heads,
        page_size=page_size,
        max_pages=max_pages,
        pages=pages,
        batch_rows=batch_rows,
        splits=splits,
        visits=-(-reach // (pages * splits)),
        window=window,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )


def _page_bounds(spec: _Spec, lengths):
    """int32 [B] each: tokens of a row, and the first and the last page of it that a query sees."""
    first = jnp.zeros_like(lengths)
    if spec.window is not None:
        first = jnp.maximum(lengths - spec.num_queries - spec.window + 1, 0) // spec.page_size
    last = jnp.clip(-(-lengths // spec.page_size) - 1, 0, spec.max_pages - 1)
    return lengths, first, last


def _padded(dim: int) -> int:
    """Lanes are 128."""
    return -(-dim // 128) * 128


def _call(spec: _Spec, prefetched, q, k, v, interpret):
    """q [B, Tq x H, D], k and v [B or pages, keys x Hkv, D] -> partial out [B, splits, Tq x H, Dv], lse [..., 1]."""
    batch, rows, dim = q.shape
    value_dim = v.shape[2]
    of_rows, of_columns = _coordinates(spec)
    count = spec.batch_rows

    def page_block(i, width):
        def index(b, split, visit, lengths, first, last, *page_table):
            # Of several rows each has but the first page.
            page = jnp.minimum(
                first[b * count] + _pages_before(spec, split, visit) + i, last[b * count]
            )
            if page_table:
                return page_table[0][b * spec.max_pages + page], 0, 0
            return b, page, 0

        return pl.BlockSpec((count, spec.page_size * spec.kv_heads, width), index)

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0, 0))

    def partial_block(width):
        return pl.BlockSpec((count, None, rows, width), lambda b, split, *_: (b, split, 0, 0))

    return tpu_call(
        functools.partial(_kernel, spec, len(prefetched)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch // count, spec.splits, spec.visits),
            in_specs=(
                pl.BlockSpec((count, rows, dim), lambda b, *_: (b, 0, 0)),
                whole(of_rows),
                whole(of_columns),
                [page_block(i, dim) for i in range(spec.pages)],
                [page_block(i, value_dim) for i in range(spec.pages)],
            ),
            out_specs=(partial_block(value_dim), partial_block(1)),
            scratch_shapes=(
                pltpu.VMEM((count, rows, 1), jnp.float32),
                pltpu.VMEM((count, rows, 1), jnp.float32),
                pltpu.VMEM((count, rows, value_dim), jnp.float32),
            ),
        ),
        out_shape=(
            shaped_like(q, (batch, spec.splits, rows, value_dim), jnp.float32),
            shaped_like(q, (batch, spec.splits, rows, 1), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpreter(interpret, q),
        name="decode_attention",
    )(*prefetched, q, of_rows, of_columns, [k] * spec.pages, [v] * spec.pages)


def _pages_before(spec: _Spec, split, visit):
    """Pages that earlier visits to the row read."""
    return (split * spec.visits + visit) * spec.pages


def _coordinates(spec: _Spec):
    """int32 [Tq x H, 2], key head and query of a row; int32 [2, keys x Hkv], key head and key of a column of a page.

    They are arguments, because the vector unit has no integer division.
    """
    row = jnp.arange(spec.num_queries * spec.heads, dtype=jnp.int32)
    column = jnp.arange(spec.page_size * spec.kv_heads, dtype=jnp.int32)
    head = row % spec.heads // (spec.heads // spec.kv_heads)
    return (
        jnp.stack([head, row // spec.heads], axis=1),
        jnp.stack([column % spec.kv_heads, column // spec.kv_heads]),
    )


def _kernel(spec: _Spec, num_prefetched: int, *refs):
    """One visit to a few rows of the batch: of each q [rows, D], a few k [columns, D] and v [columns, Dv].

    Writes out [rows, Dv] and lse [rows, 1] of a split.
    """
    (lengths, first, *_), refs = refs[:num_prefetched], refs[num_prefetched:]
    q, of_rows, of_columns, k, v, out, lse, *carried = refs
    block, split, visit = (pl.program_id(axis) for axis in range(3))
    pages = []
    for i in range(spec.batch_rows):
        row = block * spec.batch_rows + i
        begin = first[row] + _pages_before(spec, split, visit)
        starts = [(begin + j) * spec.page_size for j in range(spec.pages)]
        pages += [
            _Page(i, start, lengths[row], k[j].at[i], v[j].at[i]) for j, start in enumerate(starts)
        ]

    def write(highest, totals, values):
        # A row that sees nothing has total 0: out 0, lse -inf.
        out[...] = values / jnp.where(totals == 0, 1, totals)
        lse[...] = highest * (1 / LOG2_E) + jnp.log(totals)

    visited = functools.partial(_visited, spec, pages, q, of_rows, of_columns)
    nothing = jnp.full(lse.shape, LOWEST), jnp.zeros(lse.shape), jnp.zeros(out.shape)
    if spec.visits == 1:
        write(*visited(nothing))
        return

    @pl.when(visit == 0)
    def _():
        for ref, start in zip(carried, nothing, strict=True):
            ref[...] = start

    # One row, as of several each has a single page.
    @pl.when(pages[0].start < pages[0].length)
    def _():
        for ref, now in zip(carried, visited([ref[...] for ref in carried]), strict=True):
            ref[...] = now

    @pl.when(visit == pl.num_programs(2) - 1)
    def _():
        write(*(ref[...] for ref in carried))


@dataclasses.dataclass(frozen=True)
class _Page:
    """A page of a visit: the row of the batch in the visit, its first token, the row's length; refs of k and v."""

    row: int
    start: Any
    length: Any
    k: Any
    v: Any


def _visited(spec: _Spec, pages: list[_Page], q, of_rows, of_columns, before):
    """The softmax over what was `before` and the pages of a visit, each row of the batch with its own.

    Returns:
        Highest logit times log2(e) [batch_rows, rows, 1], sum of weights [..., 1] and of weighted values [..., Dv].
    """
    highest, totals, values = before
    # All pages at once, so that their products do not wait for each other.
    logits = [_logits(spec, q[page.row], page, of_rows, of_columns) for page in pages]
    maxima = _by_row(spec, [x.max(axis=1, keepdims=True) for x in logits], jnp.maximum)
    now = jnp.maximum(maxima, highest)
    weights = [jnp.exp2(x - now[page.row]) for x, page in zip(logits, pages, strict=True)]
    sums = [x.sum(axis=1, keepdims=True) for x in weights]
    products = [
        dot(x.astype(page.v.dtype), _only_tokens(spec, page))
        for x, page in zip(weights, pages, strict=True)
    ]
    rescale = jnp.exp2(highest - now)
    return (
        now,
        totals * rescale + _by_row(spec, sums, jnp.add),
        values * rescale + _by_row(spec, products, jnp.add),
    )


def _by_row(spec: _Spec, of_pages, merge_pages):
    """Merges what there is of each page, [rows, ...] -> [batch_rows, rows, ...]."""
    starts = range(0, len(of_pages), spec.pages)
    return jnp.stack([functools.reduce(merge_pages, of_pages[i : i + spec.pages]) for i in starts])


def _logits(spec: _Spec, q, page: _Page, of_rows, of_columns):
    """Logits times log2(e) [rows, columns] of the queries q [rows, D] with the keys of a page."""
    products = dot(q, page.k[...], (1, 1))
    if spec.logits_soft_cap is None:
        logits = products * (spec.scale * LOG2_E)
    else:
        cap = spec.logits_soft_cap
        logits = (cap * LOG2_E) * jnp.tanh(products * (spec.scale / cap))
    position = of_rows[:, 1:] + (page.length - spec.num_queries)
    distance = position - (of_columns[1:] + page.start)
    allowed = (of_rows[:, :1] == of_columns[:1]) & (distance >= 0)
    if spec.window is not None:
        allowed &= distance < spec.window
    return jnp.where(allowed, logits, -jnp.inf)


def _only_tokens(spec: _Spec, page: _Page):
    """v of a page with 0 behind the row's length, where the cache may hold NaN, which a weight of 0 does not remove."""
    v = page.v[...]
    pairs = v.dtype == jnp.bfloat16 and spec.kv_heads % 2 == 0
    # Two columns of a token are one word, which is not taken apart.
    words = pltpu.bitcast(v, jnp.int32) if pairs else v
    word = jax.lax.broadcasted_iota(jnp.int32, (words.shape[0], 1), 0)
    of_tokens = (page.length - page.start) * (spec.kv_heads // 2 if pairs else spec.kv_heads)
    words = jnp.where(word < of_tokens, words, 0)
    return pltpu.bitcast(words, v.dtype) if pairs else words
