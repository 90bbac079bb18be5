"""The presets `switch` and `adamoe` as whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import models

TINY = {"vocab_size": 31, "d_model": 16, "num_layers": 1, "ffn": {"num_experts": 4}}


def create(name, **overrides):
    return models.create(name, **{**TINY, **overrides})


def init(model, tokens):
    return jax.jit(model.init)(jax.random.key(0), tokens)["params"]


def loss_fn(model, tokens):
    def loss(params):
        out = model.apply(
            {"params": params}, tokens, train=True, rngs={"routing": jax.random.key(1)}
        )
        nats = optax.softmax_cross_entropy_with_integer_labels(out.logits[:, :-1], tokens[:, 1:])
        return jnp.mean(nats) + sum(out.aux.values()), out

    return loss


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [
        ("adamoe", "dropless"),  # with capacity: tests/test_composition.py
        pytest.param("adamoe", "capacity", marks=pytest.mark.slow),
        pytest.param("switch", "dropless", marks=pytest.mark.slow),
        pytest.param("switch", "capacity", marks=pytest.mark.slow),
    ],
)
def test_every_parameter_learns(rng, name, dispatch):
    model = create(name, **{"ffn.dispatch": dispatch})
    tokens = jnp.asarray(rng.integers(0, 31, size=(4, 48)))
    params = init(model, tokens)
    gradient, out = jax.jit(jax.grad(loss_fn(model, tokens), has_aux=True))(params)
    assert out.aux.keys() == {"loss/load_balancing", "loss/router_z"}
    assert out.metrics["token/experts"].shape == tokens.shape
    assert out.metrics["flops/spent"] <= out.metrics["flops/full"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert (leaf != 0).any(), path


@pytest.mark.parametrize("name", [pytest.param("switch", marks=pytest.mark.slow), "adamoe"])
def test_scanned_and_rematerialised_layers_give_the_same(rng, name):
    tokens = jnp.asarray(rng.integers(0, 31, size=(2, 24)))
    model = create(name, num_layers=2, remat="full")
    scanned = create(name, num_layers=2, scan_layers=True)
    params = init(model, tokens)
    layers = params["depth"]["layers"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers.values())
    scanned_shapes = jax.eval_shape(scanned.init, jax.random.key(0), tokens)["params"]
    tree = jax.tree.structure(scanned_shapes["depth"])
    depth = tree.unflatten(jax.tree.leaves(stacked))
    one = jax.jit(model.apply)({"params": params}, tokens)
    other = jax.jit(scanned.apply)({"params": params | {"depth": depth}}, tokens)
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    for key, value in one.metrics.items():
        np.testing.assert_allclose(other.metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


def test_switch_spends_what_the_dense_model_does():
    tokens = jnp.zeros((1, 32), jnp.int32)
    spent = {}
    for name in ("transformer", "switch"):
        model = models.create(name, **{"d_model": 96})
        metrics = jax.eval_shape(lambda m=model: m.init_with_output(jax.random.key(0), tokens)[0])
        assert "flops/full" in metrics.metrics
        spent[name] = model.stack().flops_per_token(96, 32)
    router = 4 * 2 * 96 * 8
    assert spent["switch"] == spent["transformer"] + router


def test_a_pattern_is_learnt(rng):
    """A few steps of training: routing does not stand in the way."""
    model = create("adamoe")
    row = rng.integers(0, 31, size=8)
    tokens = jnp.asarray(np.tile(row, (4, 6)))
    params = init(model, tokens)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        (loss, _), gradient = jax.value_and_grad(loss_fn(model, tokens), has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] > 3
    assert losses[-1] < 0.6
