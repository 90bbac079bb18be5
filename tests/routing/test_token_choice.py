"""Token choice against float64 loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.routing import top_k


def reference(logits, k, num_null, bias=None):
    """Chosen experts and their weights for one token, in float64."""
    num_experts = len(logits) - num_null
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    score = probs if bias is None else probs + bias
    chosen = sorted(range(len(logits)), key=lambda e: -score[e])[:k]
    total = sum(probs[e] for e in chosen if e < num_experts)
    return chosen, [probs[e] / total if e < num_experts else 0.0 for e in chosen], probs


@pytest.mark.parametrize(("k", "num_null"), [(1, 0), (2, 0), (5, 0), (3, 4), (9, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_top_k(rng, k, num_null, biased):
    logits = rng.normal(scale=2, size=(2, 15, 5 + num_null))
    bias = rng.normal(scale=0.2, size=5 + num_null) if biased else None
    actual = top_k.top_k(
        jnp.asarray(logits, jnp.float32),
        k,
        num_null=num_null,
        bias=None if bias is None else jnp.asarray(bias, jnp.float32),
    )
    assert actual.indices.shape == actual.weights.shape == (2, 15, k)
    for where in np.ndindex(2, 15):
        chosen, weights, probs = reference(logits[where], k, num_null, bias)
        np.testing.assert_array_equal(actual.indices[where], chosen)
        np.testing.assert_allclose(actual.weights[where], weights, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(actual.probs[where], probs, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(actual.true[where], np.array(chosen) < 5)


def test_a_token_with_null_experts_only_has_no_weight():
    logits = jnp.array([[0.0, 1.0, 5.0, 6.0], [0.0, 1.0, -5.0, 0.5]])
    assignment = top_k.top_k(logits, 2, num_null=2)
    np.testing.assert_array_equal(assignment.indices, [[3, 2], [1, 3]])
    np.testing.assert_array_equal(assignment.weights, [[0.0, 0.0], [1.0, 0.0]])


def test_weights_survive_scores_whose_probabilities_underflow():
    """The null expert takes all the probability that float32 can tell from 1."""
    assignment = top_k.top_k(jnp.array([-200.0, -201.0, 100.0]), 3, num_null=1)
    expected = [0.0, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]
    np.testing.assert_array_equal(assignment.indices, [2, 0, 1])
    np.testing.assert_allclose(assignment.weights, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_extreme_scores_give_finite_weights_and_gradients(rng, scale):
    logits = jnp.asarray(rng.normal(size=(8, 7)) * scale, jnp.float32)
    value, gradient = jax.value_and_grad(
        lambda x: jnp.sum(top_k.top_k(x, 3, num_null=3).weights * jnp.arange(3.0))
    )(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_gradient_of_the_weights(rng):
    """Directional derivative of the float64 reference."""
    logits, direction = rng.normal(size=(2, 12, 8))
    target = rng.normal(size=(12, 4))

    def loss(x):
        return sum(np.dot(reference(row, 4, 3)[1], t) for row, t in zip(x, target, strict=True))

    h = 1e-6
    expected = (loss(logits + h * direction) - loss(logits - h * direction)) / (2 * h)
    gradient = jax.grad(lambda x: jnp.sum(top_k.top_k(x, 4, num_null=3).weights * target))(
        jnp.asarray(logits, jnp.float32)
    )
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3, atol=1e-5)


def test_the_bias_gets_no_gradient(rng):
    logits = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    gradient = jax.grad(lambda b: jnp.sum(top_k.top_k(logits, 2, bias=b).weights ** 2))(
        jnp.zeros(6)
    )
    np.testing.assert_array_equal(gradient, np.zeros(6))


def test_switch_weight_is_the_probability_itself(rng):
    logits = rng.normal(size=(3, 10, 6))
    assignment = top_k.switch(jnp.asarray(logits, jnp.float32))
    for where in np.ndindex(3, 10):
        _, _, probs = reference(logits[where], 1, 0)
        np.testing.assert_array_equal(assignment.indices[where], [np.argmax(probs)])
        np.testing.assert_allclose(assignment.weights[where], [probs.max()], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), r"top_k=0; valid: 1 to 4"),
        ((7, 4, 2), r"top_k=7; valid: 1 to 6"),
        ((1, 0, 2), r"num_experts=0; valid: at least 1"),
        ((1, 4, -1), r"num_null=-1; valid: at least 0"),
    ],
)
def test_impossible_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_k.check_choices(*arguments)
