"""Rows of a pool of caches: what they write, where, and what attention reads; used in serving/test_depthwise.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import KVState
from effjax.mixers.kv_pool import KVPool, KVRows
from pallas_kernels import decode_attention

ROWS, HEADS, DIM = 5, 2, 4


def random_pool(rng, num_slots):
    shape = (ROWS, num_slots, HEADS, DIM)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    length = rng.integers(1, 2 * num_slots, size=ROWS)
    return KVPool(k, v, jnp.asarray(length, jnp.int32))


def random_token(rng, batch_size, segment_ids):
    shape = (batch_size, 1, HEADS, DIM)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    column = jnp.asarray(segment_ids, jnp.int32)[:, None]
    return KVState(k, v, jnp.zeros_like(column), column, column[:, 0])


@pytest.mark.parametrize(("num_slots", "page_size"), [(16, 16), (24, 8), (7, 7)])
def test_a_token_goes_into_its_row_and_nowhere_else(rng, num_slots, page_size):
    pool = random_pool(rng, num_slots)
    # One that writes, one that only reads, one that has no token, and one without a row.
    rows, writes, segment_ids = [3, 0, 4, ROWS], [True, False, True, True], [1, 1, 0, 1]
    new = random_token(rng, 4, segment_ids)
    lent = KVRows(pool, jnp.array(rows), jnp.array(writes))
    assert lent.page_size == page_size
    got = jax.jit(KVRows.append)(lent, new)
    slot = int(pool.length[3]) % num_slots
    for name in ("k", "v"):
        want = np.array(getattr(pool, name))
        want[3, slot] = getattr(new, name)[0, 0]
        np.testing.assert_array_equal(getattr(got.pool, name), want)
    np.testing.assert_array_equal(got.pool.length - pool.length, [0, 0, 0, 1, 0])
    np.testing.assert_array_equal(got.length[:3], got.pool.length[np.array(rows[:3])])


def test_attention_reads_the_rows_where_they_lie(rng):
    pool = random_pool(rng, 24)
    rows = np.array([2, 4, 2, 1])
    lent = KVRows(pool, jnp.array(rows), jnp.zeros(4, bool))
    q = jnp.asarray(rng.normal(size=(4, 1, HEADS, DIM)), jnp.float32)
    lengths = np.minimum(lent.length, lent.num_slots)
    got = decode_attention(q, lent.k, lent.v, lengths, page_table=lent.page_table)
    for b, row in enumerate(rows):
        k, v = (np.asarray(x[row, : lengths[b]], np.float64) for x in (pool.k, pool.v))
        logits = np.einsum("hd,khd->hk", q[b, 0], k) / np.sqrt(DIM)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        want = np.einsum("hk,khd->hd", weights, v)
        np.testing.assert_allclose(got[b, 0], want, rtol=1e-5, atol=1e-6)
