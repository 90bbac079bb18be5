"""Which tiles of the Tq x Tk logits an implementation visits, and in which order.

The last axis of a TPU kernel's grid runs over the visited tiles only: a tile that the static mask leaves empty costs
no grid step and no copy to VMEM. The lists are prefetched to scalar memory, where the index maps of the blocks read
them. The others loop over the `ranges` of them.
"""

from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.blocks import LANES, Blocks
from pallas_kernels.attention.mask import Mask

# Bits of `Visits.kind`. FIRST and LAST: of the visits that share an output block. MASKED: some of the logits are not
# allowed. EMPTY: none is; such a visit only writes the zeros of an output block that has no other. CUT: none of the
# first half of the queries with the last half of the keys is. NEW: the first visit to the tile of queries, where visits
# are by keys.
FIRST, LAST, MASKED, EMPTY, CUT, NEW = 1, 2, 4, 8, 16, 32


class Visits(NamedTuple):
    """int32 [visits] each: the tile's index along queries and keys, and what it is."""

    query: np.ndarray
    key: np.ndarray
    kind: np.ndarray


def by_queries(mask: Mask, blocks: Blocks, needs_mask: bool) -> Visits:
    """The key tiles of query tile 0, of query tile 1, ...; `needs_mask`: every tile does, whatever `mask` says."""
    outer = range(0, mask.num_queries, blocks.queries)
    reach = [mask.keys_of(x, min(x + blocks.queries, mask.num_queries)) for x in outer]
    return _visits(reach, blocks.keys, lambda i, j: (i, j), mask, blocks, needs_mask)


def by_keys(mask: Mask, blocks: Blocks, needs_mask: bool) -> Visits:
    """The query tiles of key tile 0, of key tile 1, ..."""
    outer = range(0, mask.num_keys, blocks.keys)
    reach = [mask.queries_of(x, min(x + blocks.keys, mask.num_keys)) for x in outer]
    found = _visits(reach, blocks.queries, lambda i, j: (j, i), mask, blocks, needs_mask)
    (real,) = np.nonzero(found.kind & EMPTY == 0)
    found.kind[real[np.unique(found.query[real], return_index=True)[1]]] |= NEW
    return found


def ranges(visits: Visits, axis: str) -> np.ndarray:
    """The visits of each block of one side ("query" or "key"), as bounds of tiles of the other side.

    Returns:
        int32 [blocks, 4]: first, first_full, stop_full, stop; the tiles [first_full, stop_full) need no mask.
    """
    outer, inner = (visits.query, visits.key) if axis == "query" else (visits.key, visits.query)
    rows = []
    for block in range(outer.max() + 1):
        visited = inner[(outer == block) & (visits.kind & EMPTY == 0)]
        full = inner[(outer == block) & (visits.kind & (EMPTY | MASKED) == 0)]
        # What a row sees lies together, and so do the tiles of which all rows see everything.
        first, stop = (visited.min(), visited.max() + 1) if visited.size else (0, 0)
        first_full, stop_full = (full.min(), full.max() + 1) if full.size else (first, first)
        rows.append((first, first_full, stop_full, stop))
    return np.array(rows, np.int32)


def _visits(reach, inner_block, query_and_key, mask, blocks, needs_mask) -> Visits:
    rows = []
    for outer, (low, high) in enumerate(reach):
        if low == high:
            rows.append((*query_and_key(outer, 0), FIRST | LAST | EMPTY))
            continue
        first, last = low // inner_block, (high - 1) // inner_block
        for inner in range(first, last + 1):
            query, key = query_and_key(outer, inner)
            kind = FIRST * (inner == first) | LAST * (inner == last)
            kind |= MASKED * (needs_mask or not _is_full(mask, blocks, query, key))
            kind |= CUT * _is_cut(mask, blocks, query, key)
            rows.append((query, key, kind))
    return Visits(*np.array(rows, np.int32).T)


def _is_full(mask: Mask, blocks: Blocks, query: int, key: int) -> bool:
    """Whether every query of a tile sees every key of it; padded queries do not count, padded keys do."""
    first_query = query * blocks.queries + mask.offset
    last_query = min((query + 1) * blocks.queries, mask.num_queries) - 1 + mask.offset
    first_key, last_key = key * blocks.keys, (key + 1) * blocks.keys - 1
    return (
        last_key < mask.num_keys
        and (not mask.causal or last_key <= first_query)
        and (mask.window is None or last_query - first_key < mask.window)
    )


def _is_cut(mask: Mask, blocks: Blocks, query: int, key: int) -> bool:
    """Whether the first half of the queries sees none of the last half of the keys."""
    if blocks.queries % (2 * LANES) or blocks.keys % (2 * LANES):
        return False
    first_query, first_key = query * blocks.queries, key * blocks.keys
    _, high = mask.keys_of(first_query, first_query + blocks.queries // 2)
    return high <= first_key + blocks.keys // 2
