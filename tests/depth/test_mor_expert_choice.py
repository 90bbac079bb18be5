"""Mixture-of-Recursions by expert choice, against a reference that goes token by token in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion_reference import (
    D_MODEL,
    assert_all_learn,
    expert_choice,
    gradients,
    init,
    make_stack,
    packed,
    run,
)

from effjax.depth import ExpertChoice, MixtureOfRecursions, Recursive
from effjax.depth.expert_choice import WARMUP_STAGES, capacity_table
from effjax.depth.subset import Subset
from effjax.mixers import SlidingWindow
from effjax.models import create

LAYERS, RECURSIONS = 5, 3
CAPACITIES = (1.0, 2 / 3, 1 / 3)


def policy(kv_sharing="recursion_wise", **routing):
    return MixtureOfRecursions(RECURSIONS, routing=ExpertChoice(**routing), kv_sharing=kv_sharing)


@pytest.mark.parametrize("kv_sharing", ["recursion_wise", "shared"])
@pytest.mark.parametrize("train", [True, False])
def test_routing_equals_the_reference(train, kv_sharing, rng):
    inputs = packed(rng)
    mor = policy(kv_sharing)
    variables = init(mor, LAYERS, rng, inputs, router_scale=30.0)
    got, aux = run(mor, variables, inputs, LAYERS, train)

    reference = functools.partial(
        expert_choice,
        jax.tree.map(np.asarray, variables["params"]),
        capacities=CAPACITIES,
        alpha=0.1,
        train=train,
        shared_kv=kv_sharing == "shared",
    )
    outcomes = [reference(*row) for row in zip(*inputs, strict=True)]
    real = inputs[2] > 0
    depth = np.stack([depth for _, depth, _ in outcomes])
    np.testing.assert_array_equal(aux["token/depth"], depth)
    want = np.stack([y for y, _, _ in outcomes])
    np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aux["depth/mean_recursions"], depth[real].mean(), rtol=1e-5)
    if train:
        errors = [np.concatenate([e[r] for _, _, e in outcomes]).mean() for r in range(RECURSIONS)]
        np.testing.assert_allclose(aux["loss/router_bce"], 1e-3 * sum(errors), rtol=1e-4)


def test_with_room_for_all_and_an_open_gate_it_is_a_residual_recursion(rng):
    inputs = packed(rng)
    mor = policy(capacities=(1.0,) * RECURSIONS, gating="additive")
    variables = init(mor, LAYERS, rng, inputs)
    got, aux = run(mor, variables, inputs, LAYERS, train=True)
    # x + f(x) through the recursive policy itself, one recursion at a time.
    once = Recursive(1, "cycle")
    scopes = variables["params"]
    apply = lambda scope, x: run(once, {"params": {"shared": scope}}, (x, *inputs[1:]), 1, True)[0]  # noqa: E731
    x = apply(scopes["first"], inputs[0])
    for _ in range(RECURSIONS):
        x = x + apply(scopes["shared"], x)
    want = apply(scopes["last"], x)
    real = inputs[2] > 0
    np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-4)
    assert aux["depth/mean_recursions"] == RECURSIONS
    # A recursion that everyone passes has nothing to decide, so evaluation is the same function.
    evaluated, _ = run(mor, variables, inputs, LAYERS, train=False)
    np.testing.assert_allclose(evaluated[real], want[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_sharing", ["recursion_wise", "shared"])
def test_evaluation_is_causal(kv_sharing, rng):
    x, positions, segment_ids = packed(rng)
    segment_ids[:] = 1
    positions[:] = np.arange(x.shape[1])
    mor = policy(kv_sharing, selection="aux_router")
    variables = init(mor, LAYERS, rng, (x, positions, segment_ids), router_scale=30.0)
    before, aux = run(mor, variables, (x, positions, segment_ids), LAYERS, train=False)
    cut = int(rng.integers(1, x.shape[1] - 1))
    changed = x.copy()
    changed[:, cut:] = rng.normal(size=changed[:, cut:].shape)
    after, _ = run(mor, variables, (changed, positions, segment_ids), LAYERS, train=False)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert not np.allclose(before[:, cut:], after[:, cut:])
    assert 1 < aux["depth/mean_recursions"] < RECURSIONS  # tokens did differ in depth


@pytest.mark.parametrize("train", [True, False])
def test_padding_changes_nothing(train, rng):
    x, _, segment_ids = inputs = packed(rng, rows=1)
    length = int((segment_ids > 0).sum())
    mor = policy(z_weight=0.01)
    variables = init(mor, LAYERS, rng, inputs, router_scale=30.0)
    short, short_aux = run(mor, variables, tuple(a[:, :length] for a in inputs), LAYERS, train)
    x[:, length:] = (
        rng.normal(size=x[:, length:].shape) * 100
    )  # would be chosen first, were it not padding
    padded, padded_aux = run(mor, variables, inputs, LAYERS, train)
    np.testing.assert_allclose(padded[:, :length], short, rtol=1e-4, atol=1e-5)
    assert not padded_aux["token/depth"][:, length:].any()
    for name in short_aux:
        if not name.startswith(("flops/", "token/")):
            np.testing.assert_allclose(padded_aux[name], short_aux[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "routing",
    [
        pytest.param(
            {"activation": "identity", "temperature": 2.0}, id="aux_loss", marks=pytest.mark.slow
        ),
        pytest.param(
            {"selection": "aux_router", "router": "mlp", "activation": "tanh", "z_weight": 0.1},
            id="aux_router",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_parameter_learns(routing, rng):
    inputs = packed(rng)
    mor = policy(**routing)
    variables = init(mor, LAYERS, rng, inputs, router_scale=10.0)
    probe = rng.normal(size=inputs[0].shape)
    assert_all_learn(gradients(mor, variables, inputs, LAYERS, probe))


def test_an_auxiliary_router_leaves_the_hidden_states_alone(rng):
    """Its loss teaches only itself, where the auxiliary loss would also move what it reads."""
    inputs = packed(rng)
    stack = make_stack(LAYERS)

    def moved(mor):
        variables = init(mor, LAYERS, rng, inputs, router_scale=10.0)
        loss = lambda v: mor.apply(  # noqa: E731
            v, stack, inputs[0], positions=inputs[1], segment_ids=inputs[2], train=True
        )[2]["loss/router_aux" if mor.routing.selection == "aux_router" else "loss/router_bce"]
        gradients = jax.jit(jax.grad(loss))(variables)["params"]
        return {k for k, v in gradients.items() if any(np.any(leaf) for leaf in jax.tree.leaves(v))}

    assert moved(policy(selection="aux_router")) == {"routing"}
    assert moved(policy()) == {"routing", "first", "shared"}


def test_capacities_warm_up_along_a_cosine_in_stages():
    final = ExpertChoice(capacities=(1.0, 0.5, 0.25), capacity_warmup_steps=1000)
    assert final.capacities_now(3) == (1.0, 0.5, 0.25)  # a model as created is the final one
    seen = []
    for step in range(0, 1200, 5):
        now = MixtureOfRecursions(3, routing=final).at_step(step).routing
        stage = min(1.0, (step * WARMUP_STAGES // 1000) / WARMUP_STAGES)
        want = 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * stage))
        assert now.capacities_now(3)[1] == pytest.approx(want)
        if not seen or seen[-1] != now:
            seen.append(now)
    assert len(seen) == WARMUP_STAGES + 1
    assert seen[0].capacities_now(3) == (1.0, 1.0, 1.0)
    assert seen[-1].capacities_now(3) == pytest.approx((1.0, 0.5, 0.25))

    model = create("mor", **{"depth.routing.capacity_warmup_steps": 800})
    assert model.at_step(0) == model.at_step(99) != model.at_step(100)
    assert model.at_step(800) == model.at_step(10**6)
    steady = create("mor")
    assert steady.at_step(0) is steady


def test_capacity_is_the_floor_of_the_exact_share():
    assert list(capacity_table(1 / 3, 7)) == [0, 1, 1, 1, 1, 1, 2, 2]
    assert capacity_table(0.29, 100)[-1] == 29  # 0.29 * 100 < 29 in floating point
    assert list(capacity_table(1.0, 4)) == [0, 1, 2, 3, 4]


def test_a_training_step_does_less_work_than_without_routing():
    def flops(name):
        model = create(name, d_model=32, num_layers=3, vocab_size=8, **{"depth.sharing": "cycle"})
        tokens = jnp.zeros((2, 64), jnp.int32)
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))

        def loss(variables):
            out = model.apply(variables, tokens, train=True)
            return jnp.sum(out.hidden**2) + sum(out.aux.values()), out.metrics

        lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(variables)
        metrics = jax.eval_shape(lambda v: loss(v)[1], variables)
        assert {"flops/spent", "flops/full"} <= set(metrics)
        return lowered.compile().cost_analysis()["flops"]

    # Recursions of 1, 2/3 and 1/3 of the tokens: 2/3 of the work, and attention saves more on top.
    assert flops("mor") < 0.7 * flops("recursive")


def test_flops_spent_are_those_of_the_capacity(rng):
    inputs = packed(rng)
    length = inputs[0].shape[1]
    mor, stack = policy(), make_stack(LAYERS)
    variables = init(mor, LAYERS, rng, inputs)
    _, aux = run(mor, variables, inputs, LAYERS, train=True)
    sizes = [12, 8, 4]
    block = stack.take([0]).flops_per_token
    routers = 3 * 2 * D_MODEL
    want = 2 * block(D_MODEL, length) + sum(k / length * block(D_MODEL, k) for k in sizes) + routers
    np.testing.assert_allclose(aux["flops/spent"], want, rtol=1e-5)
    np.testing.assert_allclose(aux["flops/full"], 5 * block(D_MODEL, length), rtol=1e-5)

    _, aux = run(policy("shared"), variables, inputs, LAYERS, train=True)
    keys_and_values = 2 * 2 * D_MODEL * 8
    later = block(D_MODEL, length) - keys_and_values  # all keys in sight, none to make
    want = 3 * block(D_MODEL, length) + sum(k / length * later for k in sizes[1:]) + routers
    np.testing.assert_allclose(aux["flops/spent"], want, rtol=1e-5)


def test_agreement_is_one_when_the_threshold_chooses_as_the_row_does(rng):
    inputs = packed(rng)
    mor = policy(capacities=(1.0, 1.0, 1.0))
    variables = init(mor, LAYERS, rng, inputs, router_scale=30.0)
    _, aux = run(mor, variables, inputs, LAYERS, train=True)
    assert aux["depth/selection_agreement"] == 1
    assert (
        aux["depth/router_accuracy"] < 1
    )  # though the scores of recursion 1 would not have said so

    mor = policy()
    _, trained = run(mor, variables, inputs, LAYERS, train=True)
    assert 0 <= trained["depth/selection_agreement"] < 1


def test_a_subset_gathers_in_order_and_brings_back(rng):
    chosen = rng.random((5, 9)) < 0.5
    values = rng.normal(size=(5, 9, 2))
    subset = Subset.of(jnp.asarray(chosen), 4)
    taken, back = np.asarray(subset.take(values)), np.asarray(subset.spread(subset.take(values)))
    for row in range(5):
        tokens = np.flatnonzero(chosen[row])[:4]
        np.testing.assert_allclose(taken[row, : len(tokens)], values[row, tokens], rtol=1e-6)
        assert not taken[row, len(tokens) :].any()
        np.testing.assert_allclose(back[row, tokens], values[row, tokens], rtol=1e-6)
        assert not np.delete(back[row], tokens, axis=0).any()
    weights = rng.normal(size=taken.shape)
    gradient = jax.grad(lambda v: jnp.sum(subset.take(v) * weights))(jnp.asarray(values))
    np.testing.assert_allclose(gradient, subset.spread(jnp.asarray(weights)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacities": (1.0, 0.5)}, "capacities=.* valid: one for each of 3 recursions"),
        ({"capacities": (0.5, 1.0, 0.5)}, "capacities=.* valid: within .0, 1. and not increasing"),
        ({"capacities": (1.0, 0.5, 0.0)}, "capacities=.* valid: within .0, 1. and not increasing"),
        ({"activation": "sigmod"}, "unknown activation 'sigmod'; did you mean 'sigmoid'"),
        ({"gating": "weigthed"}, "unknown gating 'weigthed'; did you mean 'weighted'"),
        ({"selection": "aux"}, "unknown selection 'aux'"),
        ({"router": "lineer"}, "unknown router 'lineer'; did you mean 'linear'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: create("mor", **{f"depth.routing.{k}": v for k, v in options.items()}).init(
                jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
            )
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth.kv_sharing": "shard"}, "unknown kv_sharing 'shard'; did you mean 'shared'"),
        (
            {"depth.kv_sharing": "shared", "depth.sharing": "middle_sequence"},
            "kv_sharing='shared' with sharing",
        ),
        (
            {"depth.kv_sharing": "shared", "mixers": "short_conv"},
            "kv_sharing='shared' with the mixer 'short_conv'",
        ),
    ],
)
def test_keys_and_values_that_cannot_be_shared_are_refused(options, message):
    if "mixers" in options:
        options = options | {"mixers": ({"name": "short_conv"},)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: create("mor", **options).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        )


def test_a_threshold_that_chooses_as_many_is_the_same_function(rng):
    """Even with a window: gathered tokens are neighbours, in training and at evaluation."""

    def model(capacity):
        return create(
            "mor",
            d_model=16,
            num_layers=5,
            vocab_size=16,
            mixers=(SlidingWindow(num_heads=2, window=2),),
            **{"depth.routing.capacities": (1.0, capacity, capacity)},
        )

    tokens = jnp.asarray(rng.integers(16, size=(1, 16)), jnp.int32)
    count = 0
    while not 0 < count < 16:
        variables = jax.jit(model(0.5).init)(jax.random.key(int(rng.integers(2**31))), tokens)
        evaluated = jax.jit(model(0.5).apply)(variables, tokens)
        count = int((evaluated.metrics["token/depth"] > 1).sum())
    trained = jax.jit(functools.partial(model(count / 16).apply, train=True))(variables, tokens)
    np.testing.assert_array_equal(trained.metrics["token/depth"], evaluated.metrics["token/depth"])
    np.testing.assert_allclose(trained.logits, evaluated.logits, rtol=1e-4, atol=1e-5)
    assert trained.metrics["depth/selection_agreement"] == 1
