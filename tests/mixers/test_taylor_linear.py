"""TaylorLinear against its definition in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import TaylorLinear

D_MODEL, HEADS, FEATURES, VALUES = 12, 3, 6, 4


def taylor_linear(params, x, segment_ids, turn=lambda heads: heads):
    """Every weight 1 + s + s²/2 with s = q · k / sqrt(d), over the tokens of the segment so far."""
    project = lambda name: (x @ params[name]["kernel"]).reshape(*x.shape[:2], HEADS, -1)  # noqa: E731
    q, k, v = turn(project("query")), turn(project("key")), project("value")
    y = np.zeros(v.shape)
    for b, t in np.argwhere(segment_ids > 0):
        sees = np.flatnonzero(segment_ids[b, : t + 1] == segment_ids[b, t])
        for h in range(HEADS):
            s = k[b, sees, h] @ q[b, t, h] / np.sqrt(FEATURES)
            weights = 1 + s + s**2 / 2
            y[b, t, h] = weights @ v[b, sees, h] / weights.sum()
    return y.reshape(*x.shape[:2], -1) @ params["out"]["kernel"]


def random_params(rng):
    widths = {"query": HEADS * FEATURES, "key": HEADS * FEATURES, "value": HEADS * VALUES}
    shapes = {name: (D_MODEL, width) for name, width in widths.items()} | {
        "out": (HEADS * VALUES, D_MODEL)
    }
    return {
        name: {"kernel": rng.normal(size=shape) / np.sqrt(shape[0])}
        for name, shape in shapes.items()
    }


def packed(rng):
    """Two rows of packed segments, one with padding before, within and after."""
    segment_ids = np.array([[1] * 4 + [2] * 5 + [3], [0, 1, 1, 0, 1, 2, 2, 2, 0, 0]])
    return 2 * rng.normal(size=(2, 10, D_MODEL)), segment_ids


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_parallel_form_with_packed_segments_and_padding(rng, chunk_size):
    mixer = TaylorLinear(HEADS, FEATURES, VALUES, chunk_size=chunk_size)
    params, (x, segment_ids) = random_params(rng), packed(rng)
    y, state = jax.jit(mixer.apply)(
        {"params": jax.tree.map(jnp.float32, params)},
        jnp.float32(x),
        positions=jnp.zeros(segment_ids.shape, jnp.int32),
        segment_ids=jnp.asarray(segment_ids),
    )
    real = segment_ids > 0
    expected = taylor_linear(params, x, segment_ids)
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(state.segment_ids, [3, 2])


def test_rotary_positions_turn_queries_and_keys(rng):
    mixer = TaylorLinear(HEADS, FEATURES, VALUES, rope_base=100.0)
    params, (x, segment_ids) = random_params(rng), packed(rng)
    positions = rng.integers(50, size=segment_ids.shape)

    def turn(heads):
        angles = positions[..., None, None] * 100.0 ** (-np.arange(3) / 3)
        turned = (heads[..., :3] + 1j * heads[..., 3:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    y, _ = jax.jit(mixer.apply)(
        {"params": jax.tree.map(jnp.float32, params)},
        jnp.float32(x),
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segment_ids),
    )
    real = segment_ids > 0
    expected = taylor_linear(params, x, segment_ids, turn)
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], atol=1e-4, rtol=1e-3)


def test_gradients_are_those_of_the_definition(rng):
    """Central differences of the float64 definition, in a random direction of all parameters and x."""
    mixer = TaylorLinear(HEADS, FEATURES, VALUES, chunk_size=4)
    params, (x, segment_ids) = random_params(rng), packed(rng)
    real = segment_ids > 0
    out = rng.normal(size=x.shape) * real[..., None]
    point = {"params": params, "x": x}
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), point)

    def loss(at):
        positions = jnp.zeros(segment_ids.shape, jnp.int32)
        y, _ = mixer.apply(
            {"params": at["params"]},
            at["x"],
            positions=positions,
            segment_ids=jnp.asarray(segment_ids),
        )
        return jnp.sum(y * out)

    gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.float32, point))
    slope = sum(
        jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradient, direction))
    )

    def exact(step):
        at = jax.tree.map(lambda leaf, d: leaf + step * d, point, direction)
        return np.sum(taylor_linear(at["params"], at["x"], segment_ids) * out)

    np.testing.assert_allclose(slope, (exact(1e-5) - exact(-1e-5)) / 2e-5, rtol=1e-3, atol=1e-3)


def test_state_is_constant_float32_and_as_small_as_the_docstring_says():
    mixer = TaylorLinear(HEADS, FEATURES, VALUES)
    short, long = (mixer.init_state(2, length, D_MODEL, "bfloat16") for length in (1, 10**6))
    shapes = jax.tree.map(jnp.shape, short)
    assert shapes == jax.tree.map(jnp.shape, long)
    per_row = sum(leaf.size for leaf in short.memory) / 2
    assert per_row == HEADS * (1 + FEATURES + FEATURES * (FEATURES + 1) // 2) * (VALUES + 1)
    assert {leaf.dtype for leaf in short.memory} == {jnp.dtype("float32")}


def test_flops_do_not_depend_on_the_context():
    mixer = TaylorLinear(HEADS, FEATURES, VALUES)
    projections = D_MODEL * HEADS * (2 * FEATURES + VALUES) + HEADS * VALUES * D_MODEL
    update_and_read = 2 * HEADS * (1 + 6 + 21) * (VALUES + 1)
    assert mixer.flops_per_token(D_MODEL, 10) == 2 * (projections + update_and_read)
    assert mixer.flops_per_token(D_MODEL, 10**6) == mixer.flops_per_token(D_MODEL, 10)


def test_heads_that_do_not_divide_are_an_error():
    ones = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="num_heads=5 must divide d_model=12, or give head_dim"):
        TaylorLinear(5).init(
            jax.random.key(0), jnp.ones((1, 2, 12)), positions=ones, segment_ids=ones
        )
