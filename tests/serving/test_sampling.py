"""Drawing tokens, against probabilities that NumPy computes in float64."""

import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from effjax.serving import Sampling, sampling
from effjax.serving.sampling import adjust, draw

VOCAB, DRAWS = 12, 20_000
# A right sampler fails once in a hundred thousand runs.
TAIL = 1e-5


def probabilities(logits, sampling, seen=()):
    """The distribution of the next token [V], a token at a time."""
    logits = np.array(logits, np.float64)
    for token in seen:
        over = sampling.repetition_penalty if logits[token] > 0 else 1 / sampling.repetition_penalty
        logits[token] /= over
    order = np.argsort(-logits, kind="stable")
    if sampling.temperature == 0:
        return np.eye(VOCAB)[order[0]]
    weights = np.exp(logits / sampling.temperature - logits.max() / sampling.temperature)
    if sampling.top_k is not None:
        weights[order[sampling.top_k :]] = 0
    if sampling.top_p is not None:
        share = weights / weights.sum()
        total = 0.0
        for token in order:
            if total >= sampling.top_p:
                weights[token] = 0
            total += share[token]
    if sampling.min_p is not None:
        weights[weights < sampling.min_p * weights.max()] = 0
    return weights / weights.sum()


CASES = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.3),
    "top_k": Sampling(top_k=3),
    "all of top_k": Sampling(top_k=99),
    "top_p": Sampling(top_p=0.6),
    "tiny top_p": Sampling(top_p=1e-6),
    "whole top_p": Sampling(top_p=1.0),
    "min_p": Sampling(temperature=1.7, min_p=0.2),
    "penalty": Sampling(repetition_penalty=2.5),
    "all": Sampling(0.8, top_k=7, top_p=0.85, min_p=0.05, repetition_penalty=1.4),
    "greedy": Sampling(0.0, top_k=2, repetition_penalty=1.5),
}


@functools.partial(jax.jit, static_argnums=0)
def draw_many(num, key, logits, settings, seen):
    many = lambda a: jnp.broadcast_to(a, (num, VOCAB))  # noqa: E731
    return draw(jax.random.split(key, num), many(logits), settings, many(seen))


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_drawn_with_the_right_odds(name, rng):
    """Pearson's chi-square of the counts, tokens that are too rare for it taken together."""
    sampling = CASES[name]
    logits = np.float32(2 * rng.normal(size=VOCAB))
    seen = rng.random(VOCAB) < 0.4
    want = probabilities(logits, sampling, np.flatnonzero(seen))
    settings = sampling.settings()
    key = jax.random.key(secrets.randbelow(2**31))
    print("key:", jax.random.key_data(key))
    tokens = np.asarray(draw_many(DRAWS, key, logits, settings, seen))
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[want == 0].any()
    often = want * DRAWS >= 10
    expected = np.append(want[often], want[~often].sum()) * DRAWS
    found = np.append(counts[often], counts[~often].sum())
    expected, found = expected[expected > 0], found[expected > 0]
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert len(found) == 1 or stats.chi2.sf(chi_square, len(found) - 1) > TAIL


@pytest.mark.parametrize("name", [name for name in CASES if name != "greedy"])
def test_the_adjusted_logits_are_those_of_the_odds(name, rng):
    logits = np.float32(3 * rng.normal(size=(5, VOCAB)))
    seen = rng.random((5, VOCAB)) < 0.4
    got = jax.nn.softmax(adjust(logits, CASES[name].settings(), seen))
    want = [
        probabilities(a, CASES[name], np.flatnonzero(b)) for a, b in zip(logits, seen, strict=True)
    ]
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(got > 0, np.array(want) > 0)


def test_a_setting_may_differ_from_row_to_row(rng):
    rows = [
        Sampling(temperature=0.5, top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
        Sampling(temperature=2.0, top_k=VOCAB, top_p=1.0, min_p=1e-9, repetition_penalty=1.0),
        Sampling(temperature=0.0),
    ]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    neutral = {"top_k": VOCAB, "top_p": 1.0, "min_p": 0.0}
    settings = {
        name: np.array([getattr(row, name) or neutral.get(name, 0.0) for row in rows])
        for name in names
    }
    logits = np.float32(rng.normal(size=(3, VOCAB)))
    seen = rng.random((3, VOCAB)) < 0.4
    got = jax.nn.softmax(adjust(logits, settings, seen))
    want = [
        probabilities(*row) for row in zip(logits, rows, map(np.flatnonzero, seen), strict=True)
    ]
    np.testing.assert_allclose(got, want, atol=1e-5)

    # At several places of each row, as a draft is judged.
    logits, seen = np.float32(rng.normal(size=(3, 4, VOCAB))), rng.random((3, 4, VOCAB)) < 0.4
    got = sampling.probabilities(jnp.asarray(logits), settings, jnp.asarray(seen))
    for b, row in enumerate(rows):
        want = [
            probabilities(a, row, np.flatnonzero(s))
            for a, s in zip(logits[b], seen[b], strict=True)
        ]
        np.testing.assert_allclose(got[b], want, atol=1e-5)


def test_what_is_not_in_use_is_not_computed():
    assert Sampling().settings() == {"temperature": 1.0}
    assert Sampling(temperature=0, top_k=5, top_p=0.5, min_p=0.1).settings() == {}
    assert Sampling(temperature=0, repetition_penalty=2).settings() == {"repetition_penalty": 2.0}
    assert Sampling(top_p=1.0, top_k=3).settings() == {"temperature": 1.0, "top_k": 3.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 0.0),
        ("min_p", -1),
        ("repetition_penalty", 0),
    ],
)
def test_values_that_are_not_valid_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}; valid: "):
        Sampling(**{field: value})


def test_a_repetition_penalty_needs_to_know_what_was_seen():
    with pytest.raises(ValueError, match="repetition_penalty and seen=None; valid: "):
        adjust(jnp.zeros((1, 3)), {"repetition_penalty": 1.5})
