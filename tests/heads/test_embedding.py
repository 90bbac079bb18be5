import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.heads import Embedding
from effjax.heads.embedding import POOLINGS

REFERENCES = {
    "mean": lambda states: states.mean(axis=0),
    "first": lambda states: states[0],
    "last": lambda states: states[-1],
}


@pytest.fixture
def padded(rng):
    """Texts of several lengths, padded on either side, one filling its row and one empty."""
    hidden = rng.normal(size=(5, 7, 6)).astype(np.float32)
    starts, ends = (0, 3, 0, 2, 0), (4, 7, 7, 3, 0)
    segment_ids = np.zeros((5, 7), np.int32)
    for row, start, end in zip(segment_ids, starts, ends, strict=True):
        row[start:end] = 1
    return hidden, segment_ids


def embed(head, hidden, segment_ids, params=None):
    arguments = {"embedding": jnp.zeros((3, 6)), "segment_ids": jnp.asarray(segment_ids)}
    return head.apply({"params": params or {}}, jnp.asarray(hidden), **arguments)["embeddings"]


def reference(pooling, hidden, segment_ids):
    rows = [
        REFERENCES[pooling](states[ids > 0].astype(np.float64)) if ids.any() else np.zeros(6)
        for states, ids in zip(hidden, segment_ids, strict=True)
    ]
    return np.stack(rows)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_sees_only_the_text(padded, pooling):
    hidden, segment_ids = padded
    pooled = embed(Embedding(pooling), hidden, segment_ids)
    np.testing.assert_allclose(pooled, reference(pooling, *padded), rtol=1e-5, atol=1e-6)
    elsewhere = np.where(segment_ids[..., None] > 0, hidden, 1e6)
    np.testing.assert_allclose(embed(Embedding(pooling), elsewhere, segment_ids), pooled, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_gets_no_gradient(padded, pooling):
    hidden, segment_ids = padded
    gradient = jax.grad(lambda h: embed(Embedding(pooling), h, segment_ids).sum())(hidden)
    assert not gradient[segment_ids == 0].any()
    totals = gradient.sum(axis=1)  # a text's gradients by each coordinate add up to 1
    np.testing.assert_allclose(
        totals, np.repeat(segment_ids.any(axis=1), 6).reshape(5, 6), rtol=1e-5
    )


def test_projection(rng, padded):
    kernel = rng.normal(size=(6, 4))
    params = {"projection": {"kernel": jnp.float32(kernel)}}
    expected = reference("mean", *padded) @ kernel
    embeddings = embed(Embedding(dim=4), *padded, params=params)
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_states_are_pooled_in_float32(padded):
    hidden, segment_ids = padded
    rounded = jnp.asarray(hidden, jnp.bfloat16)
    pooled = embed(Embedding(), rounded, segment_ids)
    assert pooled.dtype == jnp.float32
    expected = reference("mean", np.asarray(rounded, np.float64), segment_ids)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "maen"}, "unknown pooling 'maen'; did you mean 'mean'"),
        ({"dim": 0}, "dim is 0; valid: 1 or more"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Embedding(**fields)
