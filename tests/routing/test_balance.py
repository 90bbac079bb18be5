"""Balancing losses and router measures against float64 loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.routing import balance, confidence


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_loss(probs, indices, num_null, mask):
    """Token by token, in float64."""
    num_experts = probs.shape[-1]
    counts, mass, tokens = np.zeros(num_experts), np.zeros(num_experts), 0
    for p, chosen, counted in zip(probs, indices, mask, strict=True):
        if counted:
            tokens += 1
            mass += p
            for e in chosen:
                counts[e] += 1
    f = counts / counts.sum()
    if num_null:
        f[-num_null:] = f[-num_null:].mean()
    return num_experts * sum(f[e] * mass[e] / tokens for e in range(num_experts))


def choices(rng, shape, k):
    """Logits, and k distinct experts a token (not the best ones: the losses must not assume it)."""
    logits = rng.normal(size=shape)
    return logits, rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1)[..., :k]


@pytest.mark.parametrize(("k", "num_null"), [(1, 0), (3, 0), (1, 2), (4, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss(rng, k, num_null, masked):
    logits, indices = choices(rng, (37, 4 + num_null), k)
    mask = rng.random(37) < 0.6 if masked else np.ones(37, bool)
    expected = reference_loss(softmax(logits), indices, num_null, mask)
    actual = balance.load_balancing_loss(
        jax.nn.softmax(jnp.asarray(logits)),
        jnp.asarray(indices),
        num_null=num_null,
        mask=jnp.asarray(mask) if masked else None,
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_load_balancing_loss_over_any_leading_axes(rng):
    logits, indices = choices(rng, (3, 5, 7, 6), 2)
    mask = rng.random((3, 5, 7)) < 0.5
    probs = softmax(logits)
    expected = reference_loss(probs.reshape(-1, 6), indices.reshape(-1, 2), 0, mask.reshape(-1))
    actual = balance.load_balancing_loss(jnp.asarray(probs), indices, mask=jnp.asarray(mask))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_load_balancing_loss_has_known_values():
    every = jnp.arange(8).reshape(4, 2)
    same = jnp.zeros((4, 1), jnp.int32)
    uniform, sure = jnp.full((4, 8), 1 / 8), jax.nn.one_hot(same[:, 0], 8)
    assert balance.load_balancing_loss(uniform, every) == pytest.approx(1)
    assert balance.load_balancing_loss(sure, every) == pytest.approx(1)
    assert balance.load_balancing_loss(sure, same) == pytest.approx(8)


def test_only_the_average_of_the_null_experts_is_balanced(rng):
    logits, _ = choices(rng, (20, 7), 1)
    probs = jax.nn.softmax(jnp.asarray(logits))
    true = rng.integers(0, 4, size=(20, 1))
    losses = []
    for null in (np.full((20, 1), 4), np.full((20, 1), 6), rng.integers(4, 7, size=(20, 1))):
        indices = jnp.asarray(np.concatenate([true, null], axis=1))
        losses.append(balance.load_balancing_loss(probs, indices, num_null=3))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    # Their share as a whole does count.
    indices = jnp.asarray(np.concatenate([true, (true + 1) % 4], axis=1))
    assert abs(balance.load_balancing_loss(probs, indices, num_null=3) - losses[0]) > 1e-3


def test_gradient_of_the_load_balancing_loss(rng):
    """Directional derivative of the float64 reference; the shares do not move with the scores."""
    logits, indices = choices(rng, (16, 9), 3)
    direction, h = rng.normal(size=logits.shape), 1e-6
    mask = np.ones(16, bool)
    up, down = (
        reference_loss(softmax(logits + s * h * direction), indices, 4, mask) for s in (1, -1)
    )
    gradient = jax.grad(
        lambda x: balance.load_balancing_loss(jax.nn.softmax(x), indices, num_null=4)
    )(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(
        np.sum(gradient * direction), (up - down) / (2 * h), rtol=1e-3, atol=1e-6
    )


def test_load_counts_assignments(rng):
    indices = rng.integers(0, 9, size=(6, 5, 3))
    mask = rng.random((6, 5)) < 0.5
    counts = np.bincount(indices[mask].reshape(-1), minlength=9)[:7]  # 7 and 8 are nobody's
    actual = balance.load(jnp.asarray(indices), 7, jnp.asarray(mask))
    np.testing.assert_allclose(actual, counts / counts.sum(), rtol=1e-6)


def test_nothing_counted_is_zero_and_not_nan():
    probs, nobody = jnp.full((5, 4), 0.25), jnp.zeros(5)
    indices = jnp.zeros((5, 1), jnp.int32)
    assert balance.load_balancing_loss(probs, indices, mask=nobody) == 0
    assert confidence.router_z_loss(probs, nobody) == 0


def test_loss_free_bias_is_worth_nothing_and_its_gradient_is_the_update(rng):
    loads = rng.dirichlet(np.ones(6))
    bias = rng.normal(size=6)
    value, (by_load, by_bias) = jax.value_and_grad(balance.loss_free_bias_loss, argnums=(0, 1))(
        jnp.asarray(loads, jnp.float32), jnp.asarray(bias, jnp.float32)
    )
    assert value == 0
    np.testing.assert_array_equal(by_load, np.zeros(6))
    np.testing.assert_array_equal(by_bias, np.sign(loads - loads.mean()))
    even = jax.grad(balance.loss_free_bias_loss, argnums=1)(jnp.full(4, 0.25), jnp.zeros(4))
    np.testing.assert_array_equal(even, np.zeros(4))


def test_loss_free_bias_balances_a_skewed_router(rng):
    skew = np.array([2.0, 1.0, 0.0, 0.0, -1.0, -1.0])
    probs = jax.nn.softmax(jnp.asarray(rng.normal(size=(600, 6)) + skew))

    def loads(bias):
        return balance.load(jax.lax.top_k(probs + bias, 2)[1], 6)

    def step(bias, _):
        load = loads(bias)
        return bias - 0.001 * jax.grad(balance.loss_free_bias_loss, argnums=1)(load, bias), load

    _, path = jax.lax.scan(step, jnp.zeros(6), length=1000)
    assert jnp.max(path[0]) * 6 > 2
    # Steps of one size end in a cycle about the even load (its single loads reach 1.1), so its mean is held.
    assert jnp.max(jnp.mean(path[-100:], axis=0)) * 6 < 1.1


def test_router_z_loss(rng):
    logits = rng.normal(scale=3, size=(4, 6, 5))
    mask = rng.random((4, 6)) < 0.5
    z = np.array([[np.log(sum(np.exp(v) for v in token)) ** 2 for token in row] for row in logits])
    actual = confidence.router_z_loss(jnp.asarray(logits))
    np.testing.assert_allclose(actual, z.mean(), rtol=1e-5)
    actual = confidence.router_z_loss(jnp.asarray(logits), jnp.asarray(mask))
    np.testing.assert_allclose(actual, z[mask].mean(), rtol=1e-5)


def test_router_z_loss_of_huge_scores_is_finite():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    value, gradient = jax.value_and_grad(confidence.router_z_loss)(logits)
    np.testing.assert_allclose(value, (1e8 + (1e4 - np.log(3)) ** 2) / 2, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_router_entropy(rng):
    probs = softmax(rng.normal(size=(11, 6)))
    expected = np.mean([-sum(p * np.log(p) for p in row) for row in probs])
    np.testing.assert_allclose(confidence.router_entropy(jnp.asarray(probs)), expected, rtol=1e-5)
    assert confidence.router_entropy(jnp.full((3, 8), 1 / 8)) == pytest.approx(np.log(8))
    assert confidence.router_entropy(jnp.eye(4)) == 0
