import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import optim, registry

PARAMS = {
    "layer": {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.full(3, 0.5)},
    "norm": {"scale": jnp.full(3, 0.5)},
    "router": {"balance_bias": jnp.zeros(4)},
}


@pytest.mark.parametrize("name", optim.names())
def test_every_optimizer_descends_a_quadratic(name):
    spec = optim.spec(name, schedule={"name": "constant", "peak": 0.05})
    optimizer, _ = optim.build(spec, num_steps=50)
    params, loss = PARAMS, lambda p: sum(jnp.sum(jnp.square(x - 1)) for x in jax.tree.leaves(p))
    state = optimizer.init(params)
    start = loss(params)
    for _ in range(20):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < start


def test_only_matrices_decay_and_balance_biases_take_plain_steps():
    spec = optim.spec(
        "adamw", weight_decay=0.1, balance_rate=0.25, schedule={"name": "constant", "peak": 1.0}
    )
    optimizer, _ = optim.build(spec, num_steps=10)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    grads["router"]["balance_bias"] = jnp.array([1.0, -1.0, 0.0, 1.0])
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        updates["layer"]["kernel"], -0.1 * PARAMS["layer"]["kernel"], rtol=1e-6
    )
    assert not updates["layer"]["bias"].any()
    assert not updates["norm"]["scale"].any()
    np.testing.assert_allclose(updates["router"]["balance_bias"], [-0.25, 0.25, 0.0, -0.25])


def test_clipping_leaves_balance_biases_out_of_the_norm():
    spec = optim.spec("sgd", clip_norm=1.0, schedule={"name": "constant", "peak": 1.0})
    optimizer, _ = optim.build(spec, num_steps=10)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    grads["router"]["balance_bias"] = jnp.full(4, 1e6)
    grads["layer"]["bias"] = jnp.array([3.0, 4.0, 0.0])
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["layer"]["bias"], [-0.6, -0.8, 0.0], rtol=1e-6)


def test_schedules_have_their_shape():
    def at(name, step, **fields):
        return float(registry.build("schedule", {"name": name, **fields})(100)(step))

    cosine = {"peak": 2.0, "warmup": 0.1, "final": 0.25}
    assert at("warmup_cosine", 0, **cosine) == 0
    assert at("warmup_cosine", 10, **cosine) == 2
    np.testing.assert_allclose(at("warmup_cosine", 55, **cosine), 2 * (0.25 + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(at("warmup_cosine", 100, **cosine), 0.5, rtol=1e-6)
    trapezoid = {"peak": 2.0, "warmup": 0.1, "decay": 0.2}
    np.testing.assert_allclose(at("warmup_stable_decay", 5, **trapezoid), 1.0, rtol=1e-6)
    assert at("warmup_stable_decay", 79, **trapezoid) == 2
    np.testing.assert_allclose(at("warmup_stable_decay", 90, **trapezoid), 1.0, rtol=1e-6)
    assert at("warmup_stable_decay", 100, **trapezoid) == 0
    assert at("constant", 99, peak=0.5) == 0.5


def test_errors_name_field_and_value():
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        optim.spec("adamww")
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        optim.spec("adamw", weight_decya=0.1)
    with pytest.raises(ValueError, match="did you mean 'peak'"):
        optim.spec("adamw", schedule={"peek": 0.1})
    schedule = registry.build(
        "schedule", {"name": "warmup_stable_decay", "warmup": 0.9, "decay": 0.2}
    )
    with pytest.raises(ValueError, match="overlap"):
        schedule(100)
    with pytest.raises(ValueError, match=r"warmup=1\.5"):
        registry.build("schedule", {"name": "warmup_cosine", "warmup": 1.5})(100)
