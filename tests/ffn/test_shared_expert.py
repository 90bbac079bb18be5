"""The expert that every token passes, and weights that are not renormalised, against the loops of `moe_reference`."""

import jax
import jax.numpy as jnp
import moe_reference
import numpy as np
import pytest

from effjax.ffn import AdaMoE, TopK

B, T, D = 2, 7, 6
SHAPE = {"num_experts": 4, "hidden_dim": 5, "dispatch": "dropless"}


def random_params(module, rng):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, D)))
    return jax.tree.map(lambda leaf: rng.normal(scale=0.7, size=leaf.shape), shapes["params"])


def apply(module, params, x):
    with jax.enable_x64(True):  # what experts add may all but cancel
        return jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x)


def shared(params, x):
    gate, up, down = (params["shared"][name]["kernel"] for name in ("gate", "up", "down"))
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("mixture", "options"), [(TopK, {"k": 2}), (AdaMoE, {"k": 4, "num_null": 8})]
)
def test_a_shared_expert_is_added(rng, mixture, options, gated):
    module = mixture(**SHAPE, shared_hidden_dim=3, gate_shared=gated)
    params, x = random_params(module, rng), rng.normal(size=(B, T, D))
    y, aux = apply(module, params, x)
    extra = shared(params, x)
    if gated:
        extra = extra / (1 + np.exp(-x @ params["shared_gate"]["kernel"]))
    chosen = moe_reference.forward(params, x, **options)
    np.testing.assert_allclose(y, chosen.y + extra, rtol=1e-4, atol=1e-5)
    plain = module.clone(shared_hidden_dim=None, gate_shared=False)
    cost = module.flops_per_token(D) - plain.flops_per_token(D)
    assert cost == 2 * (3 * D * 3 + D * gated)
    always = cost + 2 * D * (4 + module.nulls)
    per_expert = 2 * 3 * D * 5
    np.testing.assert_allclose(
        aux["flops/spent"], always + chosen.used.mean() * per_expert, rtol=1e-5
    )


def test_weights_that_are_not_renormalised(rng):
    module = TopK(**SHAPE, top_k=3, renormalise=False)
    params, x = random_params(module, rng), rng.normal(size=(B, T, D))
    y, _ = apply(module, params, x)
    expected = moe_reference.forward(params, x, k=3, renormalise=False).y
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_hidden_dim": 0}, "shared_hidden_dim=0; valid: None or at least 1"),
        ({"gate_shared": True}, "gate_shared=True without shared_hidden_dim; valid: give both"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TopK(**fields)
