"""PagedKVState against a KVState with the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.mixers import KVState, PagedKVState

ROWS, PAGE_SIZE, PAGES_OF_ROW, HEADS, HEAD_DIM = 3, 4, 3, 2, 3
NUM_PAGES = 8
ROOM = PAGE_SIZE * PAGES_OF_ROW


def empty(rng):
    """Pages in any order; the last row has fewer than it might have."""
    table = rng.permutation(NUM_PAGES + 1)[: ROWS * PAGES_OF_ROW].reshape(ROWS, PAGES_OF_ROW)
    table = np.where(table == NUM_PAGES, table[-1, -1], table)
    table[-1, -1] = NUM_PAGES
    # What the pages held before may be anything.
    pages = jnp.full((NUM_PAGES, PAGE_SIZE, HEADS, HEAD_DIM), jnp.nan)
    return PagedKVState(pages, pages, jnp.asarray(table), jnp.zeros((ROWS,), jnp.int32))


def tokens(rng, segment_ids, length):
    shape = (*segment_ids.shape, HEADS, HEAD_DIM)
    order = length[:, None] + np.cumsum(segment_ids, axis=1) - 1
    return KVState(
        k=jnp.float32(rng.normal(size=shape)),
        v=jnp.float32(rng.normal(size=shape)),
        positions=jnp.asarray(order),
        segment_ids=jnp.asarray(segment_ids),
        length=jnp.sum(jnp.asarray(segment_ids), axis=1),
    )


def test_tokens_lie_in_the_pages_as_in_a_cache_of_its_own(rng):
    paged, plain = empty(rng), KVState.empty(ROWS, ROOM, HEADS, HEAD_DIM, "float32")
    append = jax.jit(PagedKVState.append)
    for time in (3, 1, 1, 2):
        segment_ids = rng.integers(0, 2, size=(ROWS, time))
        new = tokens(rng, segment_ids, np.asarray(plain.length))
        after = np.asarray(plain.length) + segment_ids.sum(axis=1)
        assert after.max() <= PAGE_SIZE * 2  # the last row has room for these
        joined, expected = paged.concatenate(new), plain.concatenate(new)
        text = np.asarray(expected.segment_ids) > 0
        text &= segment_ids.any(axis=1)[:, None]  # what nobody reads may be anything
        np.testing.assert_array_equal(np.asarray(joined.segment_ids) > 0, text)
        for name in ("k", "v", "positions"):
            actual, wanted = (np.asarray(getattr(s, name))[text] for s in (joined, expected))
            np.testing.assert_array_equal(actual, wanted)
        paged, plain = append(paged, new), plain.append(new)
        np.testing.assert_array_equal(paged.length, plain.length)


def test_tokens_without_a_page_are_lost_and_nobody_elses_are(rng):
    state = empty(rng)
    full = tokens(rng, np.ones((ROWS, ROOM), int), np.zeros(ROWS, int))
    state = state.append(full)
    table = np.asarray(state.page_table)
    for row in range(ROWS):
        for j in range(PAGES_OF_ROW - (row == ROWS - 1)):
            span = slice(j * PAGE_SIZE, (j + 1) * PAGE_SIZE)
            np.testing.assert_array_equal(state.k[table[row, j]], full.k[row, span])
            np.testing.assert_array_equal(state.v[table[row, j]], full.v[row, span])
