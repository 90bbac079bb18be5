"""KVState against a Python list of the tokens that a row has seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import KVState

HEADS, HEAD_DIM = 2, 3


def tokens_of(rng, segment_ids):
    """Random keys and values for `segment_ids` [B, T]; positions are random too, so that a mix-up shows."""
    shape = (*segment_ids.shape, HEADS, HEAD_DIM)
    return KVState(
        k=jnp.float32(rng.normal(size=shape)),
        v=jnp.float32(rng.normal(size=shape)),
        positions=jnp.asarray(rng.integers(1000, size=segment_ids.shape)),
        segment_ids=jnp.asarray(segment_ids),
        length=jnp.sum(jnp.asarray(segment_ids) > 0, axis=1),
    )


def token(state, b, t):
    return tuple(
        np.asarray(leaf[b, t]) for leaf in (state.k, state.v, state.positions, state.segment_ids)
    )


def assert_holds(state, b, history):
    """Row b holds the newest tokens of `history`, in any order, and nothing else."""
    num_slots = state.k.shape[1]
    key = lambda entry: float(entry[0][0, 0])  # noqa: E731
    held = [token(state, b, s) for s in range(num_slots) if state.segment_ids[b, s] > 0]
    expected = history[-num_slots:]
    assert len(held) == len(expected)
    for mine, theirs in zip(sorted(held, key=key), sorted(expected, key=key), strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.parametrize("num_slots", [1, 3, 8, 50])
def test_append_keeps_the_newest_tokens_of_the_newest_segment(rng, num_slots):
    """Padding is left out, and a token is where `decode_attention` looks for it."""
    rows = 3
    state = KVState.empty(rows, num_slots, HEADS, HEAD_DIM, "float32")
    history = [[] for _ in range(rows)]
    append = jax.jit(KVState.append)
    for time in (4, 1, 9, 1, 1, 4):  # 9 overruns a ring of 8 within one append
        segment_ids = rng.choice([0, 1, 1, 2], size=(rows, time))
        new = tokens_of(rng, segment_ids)
        state = append(state, new)
        for b, t in np.argwhere(segment_ids > 0):
            if segment_ids[b, t] == segment_ids[b][segment_ids[b] > 0][-1]:
                history[b].append((segment_ids[b, t], token(new, b, t)))
        for b in range(rows):
            history[b] = [entry for entry in history[b] if entry[0] == history[b][-1][0]]
            assert_holds(state, b, [of_token for _, of_token in history[b]])
            assert state.length[b] == len(history[b])
            filled = min(len(history[b]), num_slots)
            assert (state.segment_ids[b, :filled] > 0).all()


def test_padding_leaves_a_row_as_it_was(rng):
    before = KVState.empty(2, 4, HEADS, HEAD_DIM, "float32").append(
        tokens_of(rng, np.ones((2, 3), int))
    )
    after = before.append(tokens_of(rng, np.array([[0, 0], [0, 1]])))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), before, after)
    assert after.length.tolist() == [3, 4]


def test_keys_are_cast_to_the_dtype_of_the_cache(rng):
    state = KVState.empty(1, 4, HEADS, HEAD_DIM, "bfloat16").append(
        tokens_of(rng, np.ones((1, 2), int))
    )
    assert state.k.dtype == state.v.dtype == jnp.bfloat16


def test_concatenate_puts_the_new_slots_last(rng):
    old, new = tokens_of(rng, np.array([[1, 2]])), tokens_of(rng, np.array([[0, 3, 4]]))
    joined = old.concatenate(new)
    assert joined.segment_ids.tolist() == [[1, 2, 0, 3, 4]]
    jax.tree.map(np.testing.assert_array_equal, token(joined, 0, 1), token(old, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, token(joined, 0, 4), token(new, 0, 2))


def test_frozen_is_static(rng):
    state = tokens_of(rng, np.ones((1, 2), int))
    assert not state.frozen and state.freeze().frozen
    assert jax.tree.structure(state) != jax.tree.structure(state.freeze())
