import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.objectives.matryoshka import nested


def squared_prefix(z):
    """L(z[:m]) = |z[:m]|^2, with the length of the prefix as a metric."""

    def loss_at(dim):
        return jnp.sum(jnp.square(z[:dim])), {"coordinates": dim}

    return loss_at


@pytest.mark.parametrize("weights", [None, (0.5, 0.0, 3.0)])
def test_weighted_sum_over_prefixes(rng, weights):
    z, dims = rng.normal(size=6), (1, 2, 5)
    importances = weights or (1.0, 1.0, 1.0)
    loss, metrics = nested(squared_prefix(jnp.float32(z)), dims, weights)
    expected = sum(c * np.sum(z[:m] ** 2) for m, c in zip(dims, importances, strict=True))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics == {"coordinates/1": 1, "coordinates/2": 2, "coordinates/5": 5}


def test_gradient_counts_the_prefixes_that_hold_a_coordinate(rng):
    z, dims, weights = rng.normal(size=6), (1, 2, 5), (0.5, 1.0, 3.0)
    gradient = jax.grad(lambda z: nested(squared_prefix(z), dims, weights)[0])(jnp.float32(z))
    importance = np.array([4.5, 4.0, 3.0, 3.0, 3.0, 0.0])  # of each coordinate, by hand
    np.testing.assert_allclose(gradient, 2 * z * importance, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [
        ((), None, r"matryoshka_dims is \(\); valid: one or more increasing positive integers"),
        ((2, 1), None, r"matryoshka_dims is \(2, 1\); valid"),
        ((1, 2), (1.0,), r"matryoshka_weights is \(1.0,\); valid: 2 numbers, one for each"),
        ((1, 2), (1.0, -1.0), r"matryoshka_weights is \(1.0, -1.0\); valid: .*not negative"),
        ((1, 2), (1.0, float("nan")), r"matryoshka_weights is \(1.0, nan\); valid: .*finite"),
        ((1, 2), (0.0, 0.0), r"matryoshka_weights is \(0.0, 0.0\); valid: .*not all zero"),
    ],
)
def test_bad_fields(dims, weights, message):
    with pytest.raises(ValueError, match=message):
        nested(squared_prefix(jnp.ones(6)), dims, weights)
