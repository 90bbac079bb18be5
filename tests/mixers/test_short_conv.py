"""ShortConv against its definition in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import ShortConv

D_MODEL = 6


def short_conv(params, x, segment_ids):
    linear = lambda name, x: x @ params[name]["kernel"] + params[name].get("bias", 0)  # noqa: E731
    value, gate, taps = linear("value", x), linear("gate", x), params["conv"]
    mixed = np.zeros_like(value)
    for b, t, j in np.ndindex(*x.shape[:2], len(taps)):
        if t >= j and segment_ids[b, t - j] == segment_ids[b, t]:
            mixed[b, t] += taps[len(taps) - 1 - j] * value[b, t - j]
    return linear("out", mixed / (1 + np.exp(-mixed)) * gate)


@pytest.mark.parametrize(
    "mixer",
    [
        ShortConv(),
        ShortConv(width=4, expansion=1, use_bias=False),
        ShortConv(width=1),
        ShortConv(width=20),
    ],
    ids=lambda m: f"width{m.width}",
)
def test_parallel_form_with_packed_segments_and_padding(rng, mixer):
    segment_ids = np.array([[1] * 4 + [2] * 5 + [3], [0, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    x = rng.normal(size=(2, 10, D_MODEL))
    arguments = {
        "positions": jnp.zeros((2, 10), jnp.int32),
        "segment_ids": jnp.asarray(segment_ids),
    }
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.float32(x), **arguments)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)
    variables = {"params": jax.tree.map(jnp.float32, params)}
    y, _ = jax.jit(mixer.apply)(variables, jnp.float32(x), **arguments)
    real = segment_ids > 0
    expected = short_conv(params, x, segment_ids)
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], atol=1e-4, rtol=1e-4)


def test_taps_start_uniform_in_one_over_the_root_of_the_width(rng):
    ones = jnp.ones((1, 2), jnp.int32)
    key = jax.random.key(int(rng.integers(2**31)))
    init = jax.jit(ShortConv(width=4).init)
    params = init(key, jnp.ones((1, 2, 1000)), positions=ones, segment_ids=ones)["params"]
    taps = np.asarray(params["conv"])
    assert taps.shape == (4, 2000)
    assert 0.49 < np.abs(taps).max() <= 0.5
    assert abs(taps.std() - 0.5 / np.sqrt(3)) < 0.01


def test_state_does_not_grow_and_flops_count_every_map():
    mixer = ShortConv(width=5, expansion=3)
    for length in (1, 10**6):
        state = mixer.init_state(2, length, D_MODEL, "bfloat16")
        assert state.inputs.shape == (2, 4, 18) and state.inputs.dtype == jnp.bfloat16
    assert mixer.flops_per_token(D_MODEL, 99) == 2 * (3 * D_MODEL * 18 + 5 * 18)


@pytest.mark.parametrize("field", ["width", "expansion"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field}=0; valid: a positive int"):
        ShortConv(**{field: 0})
