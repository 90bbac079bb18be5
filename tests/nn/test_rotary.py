import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.nn import rotary
from pallas_kernels.dispatch import Target


def test_pairs_turn_as_complex_numbers(rng):
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(1000, size=(2, 5))
    base = rng.uniform(100, 10_000)
    y = rotary(jnp.float32(x), jnp.asarray(positions), base)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = positions[..., None, None] * base ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angles)
    # float32 angles of up to 1000 radians are good to 6e-5.
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(y, expected, atol=5e-4)


def test_products_depend_on_the_distance_only(rng):
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    at = lambda x, p: np.float64(rotary(jnp.asarray(x), jnp.full((1, 1), p)))  # noqa: E731
    shift = int(rng.integers(1, 50))
    np.testing.assert_allclose(
        np.sum(at(q, 9) * at(k, 4)), np.sum(at(q, 9 + shift) * at(k, 4 + shift)), atol=1e-4
    )
    assert abs(np.sum(at(q, 9) * at(k, 4)) - np.sum(at(q, 9) * at(k, 5))) > 1e-6


def test_keeps_the_dtype(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.bfloat16)
    y = rotary(x, jnp.zeros((1, 3), jnp.int32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x)  # position 0 turns nothing


def test_odd_head_dim_is_an_error():
    with pytest.raises(ValueError, match="even head_dim, got 5"):
        rotary(jnp.zeros((1, 1, 1, 5)), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize("heads, dim", [(6, 64), (3, 64), (8, 32), (2, 128), (5, 24)])
def test_on_a_tpu_the_matrix_unit_swaps_the_halves_exactly(rng, monkeypatch, heads, dim):
    x = jnp.asarray(rng.normal(size=(2, 7, heads, dim)), jnp.float32)
    positions = jnp.asarray(rng.integers(1000, size=(2, 7)))
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    turn = lambda x: jax.vjp(lambda x: rotary(x, positions), x)[1](weights)[0]  # noqa: E731
    here = rotary(x, positions), turn(x)
    monkeypatch.setattr(sys.modules["effjax.nn.rotary"], "target", lambda: Target("tpu", ""))
    assert "dot_general" in str(jax.make_jaxpr(lambda x: rotary(x, positions))(x))
    np.testing.assert_allclose(rotary(x, positions), here[0], atol=1e-6)
    np.testing.assert_allclose(turn(x), here[1], atol=1e-6)


def test_on_a_tpu_gradients_are_rounded_once(rng, monkeypatch):
    monkeypatch.setattr(sys.modules["effjax.nn.rotary"], "target", lambda: Target("tpu", ""))
    positions = jnp.asarray(rng.integers(1000, size=(2, 7)))
    cotangent = jnp.asarray(rng.normal(size=(2, 7, 3, 64)), jnp.bfloat16)
    turn = lambda x: jax.vjp(lambda x: rotary(x, positions), x)[1](x)[0]  # noqa: E731
    exact = turn(cotangent.astype(jnp.float32))
    np.testing.assert_array_less(abs(turn(cotangent) - exact), 2**-8 * abs(exact) + 1e-6)
