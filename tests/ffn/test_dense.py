"""Dense and gated feed-forwards against float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ffn import Dense, Gated
from effjax.ffn.dense import gated_width

NUMPY = {
    "gelu": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": np.vectorize(lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2)))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def randomised(module, rng, d_model):
    """Float64 parameters of the module's shapes, with biases that matter."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, d_model)))
    return jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape), shapes)["params"]


def linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


@pytest.mark.parametrize("activation", NUMPY)
@pytest.mark.parametrize("use_bias", [False, True])
def test_dense(rng, activation, use_bias):
    module = Dense(hidden_dim=13, activation=activation, use_bias=use_bias)
    params, x = randomised(module, rng, 6), rng.normal(size=(2, 3, 6))
    expected = linear(params["down"], NUMPY[activation](linear(params["up"], x)))
    actual, _ = module.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert ("bias" in params["up"]) == use_bias


@pytest.mark.parametrize("activation", NUMPY)
@pytest.mark.parametrize("use_bias", [False, True])
def test_gated(rng, activation, use_bias):
    module = Gated(hidden_dim=13, activation=activation, use_bias=use_bias)
    params, x = randomised(module, rng, 6), rng.normal(size=(2, 3, 6))
    gate = NUMPY[activation](linear(params["gate"], x))
    expected = linear(params["down"], gate * linear(params["up"], x))
    actual, _ = module.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [Dense(), Gated(), Gated(hidden_dim=40)])
def test_flops_are_those_of_the_matrix_products(module):
    x = jnp.zeros((2, 64, 32))
    params = module.init(jax.random.key(0), x)
    compiled = jax.jit(lambda p, x: module.apply(p, x)[0]).lower(params, x).compile()
    _, aux = module.apply(params, x)
    counted = compiled.cost_analysis()["flops"] / 128
    assert aux["flops/spent"] == aux["flops/full"] == module.flops_per_token(32)
    # Activations are the rest: a few operations for each of the hidden units.
    assert module.flops_per_token(32) <= counted < 1.25 * module.flops_per_token(32)


def test_a_gated_layer_has_the_parameters_of_a_dense_one():
    assert [gated_width(d) for d in (12, 128, 512)] == [32, 352, 1376]
    for d_model in (96, 384):
        x = jnp.zeros((1, 1, d_model))
        sizes = [
            sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(m.init, jax.random.key(0), x)))
            for m in (Dense(), Gated())
        ]
        assert sizes[0] == sizes[1]


def test_computes_in_the_dtype_of_the_input():
    for module in (Dense(), Gated()):
        y, aux = module.apply(
            module.init(jax.random.key(0), jnp.zeros((1, 2, 8))), jnp.ones((1, 2, 8), jnp.bfloat16)
        )
        assert y.dtype == jnp.bfloat16
        assert all(value.dtype == jnp.float32 for value in aux.values())


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"unknown activation 'sulu'; did you mean 'silu'\?"):
        Dense(activation="sulu").init(jax.random.key(0), jnp.zeros((1, 1, 4)))
