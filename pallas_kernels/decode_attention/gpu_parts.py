"""How the GPU kernel divides its work: rows of a product, keys of a tile, and the parts of a row's cache.

A part is what one block reads: some tiles, which follow each other. Each of the warpgroups takes its half of every tile
and has a softmax of its own, so that they share nothing but the room for tiles.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import MULTIPROCESSORS, ROWS, WARPGROUPS

# Keys of a tile that a warpgroup takes, where a head of k and one of v have that many entries together at most: 32 KiB.
HALF_TILES = {128: 128, 256: 64}
# A copy begins with a multiple of this many rows, and has one: those of one swizzle of shared memory.
ALIGNMENT = 8
# What starting and ending a part takes, in tiles.
PART_OVERHEAD = 1
# More parts than the best number would have to save this share of its time.
TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static arguments of the kernel.

    Attributes:
        num_queries: Tq.
        group: query heads of a key head.
        rows: of a block, the queries of a key head's group: a multiple of 8, at most `ROWS`.
        row_blocks: blocks of `rows`, each of which reads the cache (the others find it in the cache of the chip).
        half: keys of a tile that a warpgroup takes.
        copy: keys of one copy from HBM: a part of a page, a page, or `half` without pages.
        size: S, of a row's cache.
        page_size: keys of a page, or None.
        parts: of a row's cache.
        window: width of the sliding window, or None.
        scale: factor on the logits.
        logits_soft_cap: c of c tanh(logits / c), or None.
        interpret: as `hopper.call` takes it.
    """

    num_queries: int
    group: int
    rows: int
    row_blocks: int
    half: int
    copy: int
    size: int
    page_size: int | None
    parts: int
    window: int | None
    scale: float
    logits_soft_cap: float | None
    interpret: Any

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return WARPGROUPS * self.half

    @property
    def alignment(self) -> int:
        """A part begins at a multiple of this many tokens."""
        return ALIGNMENT if self.page_size is None else self.copy


def make_spec(
    q, k_cache, v_cache, page_table, *, window, scale, logits_soft_cap, interpret
) -> Spec:
    """Chooses the sizes for these arrays."""
    batch, num_queries, heads, dim = q.shape
    _, size, kv_heads, value_dim = v_cache.shape
    half = half_tile(dim, value_dim)
    page_size = copy = None
    if page_table is not None:
        page_size, size = size, size * page_table.shape[1]
        copy = min(page_size, half)
    num_rows = num_queries * heads // kv_heads
    row_blocks = -(-num_rows // ROWS)
    rows = -(-num_rows // (row_blocks * ALIGNMENT)) * ALIGNMENT
    reach = size
    if window is not None:  # and what lies before it up to where a copy begins
        reach = min(size, window + num_queries - 1 + (copy or ALIGNMENT) - 1)
    tiles = -(-reach // (WARPGROUPS * half))
    return Spec(
        num_queries=num_queries,
        group=heads // kv_heads,
        rows=rows,
        row_blocks=row_blocks,
        half=half,
        copy=copy or half,
        size=size,
        page_size=page_size,
        parts=num_parts(batch * kv_heads * row_blocks, tiles),
        window=window,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        interpret=interpret,
    )


def half_tile(dim: int, value_dim: int) -> int:
    """Keys of a tile that a warpgroup takes, of heads with so many entries."""
    return next(keys for entries, keys in HALF_TILES.items() if dim + value_dim <= entries)


def num_parts(blocks: int, tiles: int) -> int:
    """Into how many parts `blocks` times `tiles` are divided: the fewest that occupy the chip about as well as any."""

    def time(parts):
        waves = -(-blocks * parts // MULTIPROCESSORS)
        return waves * (-(-tiles // parts) + PART_OVERHEAD)

    choices = range(1, min(tiles, MULTIPROCESSORS) + 1)
    enough = (1 + TOLERANCE) * min(map(time, choices))
    return next(parts for parts in choices if time(parts) <= enough)


class Part(NamedTuple):
    """What a block reads of a row's cache; scalars.

    Attributes:
        length: tokens of the row.
        start: where the part's first tile begins.
        num_tiles: of the part.
    """

    length: jax.Array
    start: jax.Array
    num_tiles: jax.Array


def part_of(spec: Spec, length, index) -> Part:
    """Part `index` of `spec.parts` of a row with `length` tokens: the tiles that it sees, divided evenly."""
    first = jnp.zeros_like(length)
    if spec.window is not None:
        first = jnp.maximum(length - (spec.num_queries + spec.window - 1), 0)
    start = first - jax.lax.rem(first, spec.alignment)
    tiles = jax.lax.div(length - start + (spec.keys - 1), spec.keys)
    before, until = (jax.lax.div(i * tiles, spec.parts) for i in (index, index + 1))
    return Part(length, start + before * spec.keys, until - before)
