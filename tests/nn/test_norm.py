import jax.numpy as jnp
import numpy as np
import pytest

from effjax import registry
from effjax.nn import LayerNorm, RMSNorm


@pytest.mark.parametrize("zero_centred", [False, True])
def test_rms_norm(rng, zero_centred):
    x, scale = 3 * rng.normal(size=(2, 4, 8)), rng.normal(size=8)
    norm = RMSNorm(epsilon=1e-3, zero_centred=zero_centred)
    y = norm.apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    factor = zero_centred + scale
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3) * factor
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_layer_norm(rng, use_bias):
    x, scale, bias = 5 + 3 * rng.normal(size=(2, 4, 8)), rng.normal(size=8), rng.normal(size=8)
    params = {"scale": jnp.float32(scale)} | ({"bias": jnp.float32(bias)} if use_bias else {})
    y = LayerNorm(epsilon=1e-3, use_bias=use_bias).apply({"params": params}, jnp.float32(x))
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-3)
    expected = (x - x.mean(axis=-1, keepdims=True)) / deviation * scale + bias * use_bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_statistics_are_float32_for_bfloat16_inputs(rng, name):
    # In bfloat16 the mean square of 4096 values would stop growing at 256 or so.
    x = jnp.asarray(100 * rng.normal(size=(2, 4096)), jnp.bfloat16)
    norm = registry.build("norm", name)
    params = {"scale": jnp.ones(4096), "bias": jnp.zeros(4096)}
    y = norm.apply({"params": params if name == "layer" else {"scale": params["scale"]}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.mean(np.square(np.float64(y)), axis=-1), 1, atol=0.01)
