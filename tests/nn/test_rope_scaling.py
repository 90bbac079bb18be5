"""Slower rotary frequencies, against the cases that define them, written out in NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import Attention
from effjax.nn import rotary
from effjax.nn.rotary import Scaling


def test_linear_scaling_is_interpolation_between_positions(rng):
    x, factor = jnp.asarray(rng.normal(size=(1, 6, 2, 8)), jnp.float32), int(rng.integers(2, 9))
    positions = jnp.arange(6)[None]
    scaled = rotary(x, factor * positions, scaling=Scaling("linear", factor))
    np.testing.assert_allclose(scaled, rotary(x, positions), atol=1e-5)


def test_llama3_scaling_by_wavelength(rng):
    """Case by case, as the Llama 3.1 code has it."""
    factor, low, high, original = 8.0, 1.0, 4.0, int(rng.integers(100, 10_000))
    frequencies = 10_000.0 ** -rng.uniform(0, 1, size=64)
    expected, cases = [], set()
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            cases.add("kept")
            expected.append(frequency)
        elif wavelength > original / low:
            cases.add("slowed")
            expected.append(frequency / factor)
        else:
            cases.add("between")
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    assert len(cases) == 3
    actual = Scaling("llama3", factor, low, high, original)(jnp.asarray(frequencies, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": "lineal"}, r"unknown rope_scaling 'lineal'; did you mean 'linear'\?"),
        ({"rope_scaling": "linear", "rope_factor": 0.0}, "rope_factor=0.0; valid: greater than 0"),
        (
            {"rope_scaling": "llama3", "rope_low_freq_factor": 4.0},
            "rope_low_freq_factor=4.0, rope_high_freq_factor=4.0; valid: 0 < low < high",
        ),
        (
            {"rope_scaling": "llama3", "rope_original_length": 0},
            "rope_original_length=0; valid: at least 1",
        ),
        ({"qk_norm_over": "head_dim"}, r"unknown qk_norm_over 'head_dim'; did you mean 'head'\?"),
    ],
)
def test_bad_fields_of_attention_are_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        Attention(**fields)
