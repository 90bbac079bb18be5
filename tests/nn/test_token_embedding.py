"""The beginning of a model, against sums of table rows in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.nn import LayerNorm, TokenEmbedding

VOCAB, D, POSITIONS = 7, 6, 5
SIZES = {"sizes": (VOCAB, D, POSITIONS), "dtype": "float32"}


def random_params(module, rng):
    ones = jnp.ones((1, 1), jnp.int32)
    params = module.init(jax.random.key(0), ones, ones, **SIZES)["params"]
    return jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scale_by_width": True},
        {"learned_positions": True, "num_types": 3, "norm": LayerNorm(epsilon=1e-3)},
    ],
)
def test_rows_of_tables(rng, fields):
    module = TokenEmbedding(**fields)
    params = random_params(module, rng)
    tokens, positions = rng.integers(VOCAB, size=(2, 4)), rng.integers(POSITIONS, size=(2, 4))
    x, table = module.apply(
        {"params": params}, jnp.asarray(tokens), jnp.asarray(positions), **SIZES
    )
    expected = params["embedding"][tokens] * (np.sqrt(D) if module.scale_by_width else 1)
    if module.learned_positions:
        expected = expected + params["position"][positions] + params["type"][0]
        centred = expected - expected.mean(-1, keepdims=True)
        deviation = np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-3)
        expected = centred / deviation * params["out_norm"]["scale"] + params["out_norm"]["bias"]
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        table, params["embedding"]
    )  # what a tied head reads is not scaled
    half, _ = module.apply(
        {"params": params},
        jnp.asarray(tokens),
        jnp.asarray(positions),
        sizes=SIZES["sizes"],
        dtype="bfloat16",
    )
    assert half.dtype == jnp.bfloat16
