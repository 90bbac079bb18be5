import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.heads import Tied, Untied
from effjax.registry import build


@pytest.fixture
def states(rng):
    """(hidden [B, T, D], embedding [V, D], segment ids) in float64."""
    return rng.normal(size=(2, 3, 5)), rng.normal(size=(11, 5)), np.ones((2, 3), np.int32)


def logits_of(head, states, dtype=jnp.float32, params=None):
    hidden, embedding, segment_ids = states
    arguments = {"embedding": jnp.float32(embedding), "segment_ids": jnp.asarray(segment_ids)}
    return head.apply({"params": params or {}}, jnp.asarray(hidden, dtype), **arguments)["logits"]


def test_tied_scores_by_the_embedding_table(states):
    hidden, embedding, _ = states
    expected = hidden @ embedding.T
    np.testing.assert_allclose(logits_of(Tied(), states), expected, rtol=1e-5, atol=1e-5)


def test_untied_scores_by_its_own_matrix(rng, states):
    hidden, embedding, _ = states
    kernel = rng.normal(size=embedding.T.shape)
    params = {"unembed": {"kernel": jnp.float32(kernel)}}
    logits = logits_of(Untied(), states, params=params)
    np.testing.assert_allclose(logits, hidden @ kernel, rtol=1e-5, atol=1e-5)


def test_untied_needs_one_matrix_of_the_table_transposed(states):
    hidden, embedding, segment_ids = states
    arguments = {"embedding": jnp.float32(embedding), "segment_ids": jnp.asarray(segment_ids)}
    params = Untied().init(jax.random.key(0), jnp.float32(hidden), **arguments)["params"]
    assert jax.tree.map(jnp.shape, params) == {"unembed": {"kernel": (5, 11)}}


def test_soft_cap(states):
    hidden, embedding, _ = states
    expected = 3.0 * np.tanh(hidden @ embedding.T / 3.0)
    logits = logits_of(Tied(soft_cap=3.0), states)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(logits).max() < 3.0


def test_bfloat16_states_give_float32_logits(states):
    hidden, embedding, _ = states
    logits = logits_of(Tied(), states, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden @ embedding.T, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_flops_are_two_per_multiply_add(name):
    assert build("head", name).flops_per_token(5, 11) == 2 * 5 * 11
