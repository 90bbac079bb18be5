"""Mixture-of-Recursions by token choice, against a reference that goes token by token in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recursion_reference import (
    assert_all_learn,
    gradients,
    init,
    make_stack,
    packed,
    run,
    token_choice,
)

from effjax.depth import MixtureOfRecursions, TokenChoice
from effjax.depth.token_choice import fit
from effjax.models import create

LAYERS, RECURSIONS = 5, 3


def policy(kv_sharing="recursion_wise", **routing):
    return MixtureOfRecursions(RECURSIONS, routing=TokenChoice(**routing), kv_sharing=kv_sharing)


@pytest.mark.parametrize(
    ("kv_sharing", "train", "capacity_factor"),
    [("recursion_wise", True, 0.7), ("shared", True, 1.25), ("recursion_wise", False, 0.7)],
)
def test_routing_equals_the_reference(kv_sharing, train, capacity_factor, rng):
    inputs = packed(rng)
    segment_ids = inputs[2]
    mor = policy(kv_sharing, capacity_factor=capacity_factor)
    variables = init(mor, LAYERS, rng, inputs, router_scale=30.0)
    got, aux = run(mor, variables, inputs, LAYERS, train)

    sizes = {0.7: (12, 6, 3), 1.25: (12, 10, 5)}[capacity_factor] if train else (12, 12, 12)
    reference = functools.partial(
        token_choice,
        jax.tree.map(np.asarray, variables["params"]),
        num_recursions=RECURSIONS,
        sizes=sizes,
        shared_kv=kv_sharing == "shared",
    )
    y, depth, wanted, probabilities = map(
        np.stack, zip(*(reference(*row) for row in zip(*inputs, strict=True)), strict=True)
    )
    real = segment_ids > 0
    np.testing.assert_array_equal(aux["token/depth"], depth)
    np.testing.assert_allclose(got[real], y[real], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        aux["depth/fraction_dropped"], (depth < wanted)[real].mean(), rtol=1e-5
    )
    share = np.array([(wanted[real] == i + 1).mean() for i in range(RECURSIONS)])
    balance = RECURSIONS * np.sum(share * probabilities[real].mean(axis=0))
    np.testing.assert_allclose(aux["loss/balancing"], 0.1 * balance, rtol=1e-4)
    entropy = -np.sum(probabilities[real] * np.log(probabilities[real]), axis=-1).mean()
    np.testing.assert_allclose(aux["depth/router_entropy"], entropy, rtol=1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_routing_is_causal(train, rng):
    """While training too: who finds a place depends on the tokens before."""
    x, positions, segment_ids = packed(rng)
    segment_ids[:] = 1
    positions[:] = np.arange(x.shape[1])
    mor = policy(capacity_factor=0.8)
    variables = init(mor, LAYERS, rng, (x, positions, segment_ids), router_scale=30.0)
    before, _ = run(mor, variables, (x, positions, segment_ids), LAYERS, train)
    cut = int(rng.integers(1, x.shape[1] - 1))
    changed = x.copy()
    changed[:, cut:] = rng.normal(size=changed[:, cut:].shape)
    after, _ = run(mor, variables, (changed, positions, segment_ids), LAYERS, train)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert not np.allclose(before[:, cut:], after[:, cut:])


def test_tokens_without_a_place_end_earlier():
    wanted = jnp.array([[3, 2, 0, 3, 1, 3, 2]])
    assert fit(wanted, (7, 7, 7)).tolist() == wanted.tolist()
    # The second recursion has three places, the third has one.
    assert fit(wanted, (7, 3, 1)).tolist() == [[3, 2, 0, 2, 1, 1, 1]]


def test_every_parameter_learns(rng):
    inputs = packed(rng)
    mor = policy(balancing="loss_free", activation="sigmoid", router="mlp")
    variables = init(mor, LAYERS, rng, inputs, router_scale=10.0)
    probe = rng.normal(size=inputs[0].shape)
    assert_all_learn(gradients(mor, variables, inputs, LAYERS, probe))


def test_the_bias_evens_out_the_load(rng):
    """b_i <- b_i + u * sign(mean load - load_i) and nothing else, until the depths have their even share."""
    x, positions, segment_ids = inputs = packed(rng, rows=4, length=24)
    mor, stack = policy(balancing="loss_free", alpha=1.0, z_weight=0.0), make_stack(LAYERS)
    variables = init(mor, LAYERS, rng, inputs, router_scale=30.0)
    real = segment_ids > 0

    @jax.jit
    def step(variables):
        def loss(variables):
            _, _, aux = mor.apply(
                variables, stack, x, positions=positions, segment_ids=segment_ids, train=True
            )
            return aux["loss/balancing"], aux

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
        return (
            optax.apply_updates(variables, jax.tree.map(lambda g: -0.02 * g, gradients)),
            value,
            aux,
        )

    def loads(variables):
        _, aux = run(mor, variables, inputs, LAYERS, train=False)
        return np.array([np.mean(aux["token/depth"][real] == i + 1) for i in range(RECURSIONS)])

    first = loads(variables)
    updated, value, _ = step(variables)
    assert value == 0
    bias = lambda v: np.asarray(v["params"]["routing"]["balance_bias"])  # noqa: E731
    # Rounding decides about a depth whose load is even already.
    missing = first.mean() - first
    uneven = np.abs(missing) > 1e-6
    np.testing.assert_allclose(bias(updated)[uneven], 0.02 * np.sign(missing[uneven]), rtol=1e-6)
    for scope in ("first", "shared", "last"):
        jax.tree.map(
            np.testing.assert_array_equal, updated["params"][scope], variables["params"][scope]
        )
    # From a load that luck cannot make even: all take one depth.
    variables["params"]["routing"]["balance_bias"] = np.array([2, 0, 0], np.float32)
    first = loads(variables)
    for _ in range(120):
        variables, _, _ = step(variables)
    last = loads(variables)
    print("load by depth:", first, "->", last)
    assert np.abs(last - 1 / RECURSIONS).max() < 0.15
    assert np.abs(last - 1 / RECURSIONS).max() <= np.abs(first - 1 / RECURSIONS).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor=0.0; valid: above 0"),
        ({"balancing": "loss-free"}, "unknown balancing 'loss-free'; did you mean 'loss_free'"),
        ({"activation": "softmx"}, "unknown activation 'softmx'; did you mean 'softmax'"),
        ({"gating": "sum"}, "unknown gating 'sum'"),
    ],
)
def test_bad_options_are_refused(options, message):
    model = create("mor", depth={"routing": {"name": "token_choice", **options}})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
