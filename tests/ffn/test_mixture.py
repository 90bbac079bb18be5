"""Mixtures of experts against the token-by-token loops of `moe_reference`."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import moe_reference
import numpy as np
import pytest

from effjax.ffn import AdaMoE, Switch, TopK
from effjax.routing.placement import capacity

B, T, D = 2, 13, 6
SHAPE = {"num_experts": 4, "hidden_dim": 5}
MIXTURES = {
    "switch": (Switch(**SHAPE), {"k": 1, "renormalise": False, "activation": "relu"}),
    "top_k": (TopK(**SHAPE, top_k=2), {"k": 2}),
    "adamoe": (AdaMoE(**SHAPE, top_k=3, num_null=5), {"k": 3, "num_null": 5}),
    "adamoe, dense experts": (
        AdaMoE(**SHAPE, top_k=5, num_null=2, gated=False),
        {"k": 5, "num_null": 2},
    ),
}


def random_params(module, rng, d_model=D):
    """Float64 parameters of the module's shapes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, d_model)))
    return jax.tree.map(lambda leaf: rng.normal(scale=0.7, size=leaf.shape), shapes["params"])


def as_float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def apply(module, params, x, **options):
    """The compiled module: (y, aux)."""
    return jax.jit(lambda p, x: module.apply({"params": p}, x, **options))(params, x)


def rows_of(module, num_tokens=T):
    """Rows an expert has for a row of the batch; None if tokens are not dropped."""
    if module.dispatch == "dropless":
        return None
    per_token, total = module.choices, module.num_experts + module.nulls
    return min(num_tokens, int(np.ceil(num_tokens * per_token / total * module.capacity_factor)))


@pytest.fixture(params=["tight", "ample", "dropless"])
def ways(request):
    """Fields of the dispatch: buffers that overflow, buffers that hold everything, ragged groups."""
    return {
        "tight": {"capacity_factor": 0.5},
        "ample": {"capacity_factor": 100.0},
        "dropless": {"dispatch": "dropless"},
    }[request.param]


@pytest.mark.parametrize("name", MIXTURES)
def test_output_and_report(rng, name, ways):
    module, options = MIXTURES[name]
    module = module.clone(**ways, balance_weight=0.3, z_weight=0.2)
    params, x = random_params(module, rng), rng.normal(size=(B, T, D))
    want = moe_reference.forward(params, x, capacity=rows_of(module), **options)
    y, aux = apply(module, *as_float32((params, x)))

    np.testing.assert_allclose(y, want.y, rtol=1e-4, atol=1e-5)
    if "capacity_factor" in ways:
        assert (want.dropped > 0) == (ways["capacity_factor"] < 1)
    per_expert = 2 * D * 5 * (3 if module.gated else 2)
    router = 2 * D * (4 + module.nulls)
    report = {
        "loss/load_balancing": 0.3 * want.balance,
        "loss/router_z": 0.2 * want.z,
        "moe/fraction_dropped": want.dropped / want.chosen,
        "moe/router_entropy": want.entropy,
        "moe/mean_experts": want.used.mean(),
        "moe/load_imbalance": want.imbalance,
        "flops/spent": router + want.used.mean() * per_expert,
        "flops/full": router + module.choices * per_expert,
        "token/experts": want.used,
    }
    assert aux.keys() == report.keys()
    for key, value in report.items():
        np.testing.assert_allclose(aux[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
        assert aux[key].dtype == jnp.float32
    assert module.flops_per_token(D) == report["flops/full"]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("ways", [{"capacity_factor": 0.5}, {"dispatch": "dropless"}])
def test_gradients(rng, name, ways):
    """Directional derivatives of the loops, with respect to the parameters and the input."""
    module, options = MIXTURES[name]
    module = module.clone(**ways, balance_weight=0.3, z_weight=0.2)
    point = {"params": random_params(module, rng), "x": rng.normal(size=(B, T, D))}
    target = rng.normal(size=(B, T, D))

    def reference(point):
        out = moe_reference.forward(
            point["params"], point["x"], capacity=rows_of(module), **options
        )
        return np.sum(out.y * target) + 0.3 * out.balance + 0.2 * out.z

    def loss(point):
        y, aux = module.apply({"params": point["params"]}, point["x"])
        return jnp.sum(y * target) + aux["loss/load_balancing"] + aux["loss/router_z"]

    gradient = jax.jit(jax.grad(loss))(as_float32(point))
    h = 1e-6
    leaves, tree = jax.tree.flatten(point)
    for i, slope in enumerate(jax.tree.leaves(gradient)):
        direction = rng.normal(size=slope.shape)
        up, down = (
            reference(
                tree.unflatten([*leaves[:i], leaves[i] + s * h * direction, *leaves[i + 1 :]])
            )
            for s in (1, -1)
        )
        scale = np.linalg.norm(slope) * np.linalg.norm(direction)
        error = abs(np.sum(slope * direction) - (up - down) / (2 * h))
        assert error < 1e-4 * scale + 1e-6, (
            jax.tree_util.tree_leaves_with_path(point)[i][0],
            error,
        )


@pytest.mark.parametrize("name", MIXTURES)
def test_both_dispatches_agree_when_nothing_is_dropped(rng, name):
    module, _ = MIXTURES[name]
    params, x = random_params(module, rng), rng.normal(size=(3, 32, D))

    def loss(params, x, module):
        y, aux = module.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)), (y, aux)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    with jax.enable_x64(True):  # some gradients all but cancel
        buffers = run(params, x, module.clone(capacity_factor=100.0))
        groups = run(params, x, module.clone(dispatch="dropless"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), buffers, groups
    )


@pytest.mark.parametrize("batch", [4, 3])  # the second is not divided by the devices
def test_dropless_on_a_mesh_is_as_on_one_device(rng, batch):
    """With every device's tokens sorted on their own, and a length that is split too."""
    module = AdaMoE(**SHAPE, top_k=2, num_null=3, dispatch="dropless")
    params, x = random_params(module, rng), rng.normal(size=(batch, 32, D))

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(lambda params, x: module.apply({"params": params}, x)[0], params, x)
        return y, pull(jnp.sin(y))

    sizes = {"data": 2, "tensor": 2, "context": 2}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (jax.sharding.AxisType.Auto,) * 3)
    rules = (("batch", ("data",)), ("mlp", "tensor"), ("length", "context"))
    rows = jax.sharding.PartitionSpec("data" if batch % 2 == 0 else None, "context")
    with jax.enable_x64(True):  # some gradients all but cancel
        want = run(params, x)
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            got = run(params, jax.device_put(x, jax.NamedSharding(mesh, rows)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_later_tokens_cannot_push_out_earlier_ones(rng):
    module = TopK(**SHAPE, capacity_factor=0.4)
    params, x = as_float32((random_params(module, rng), rng.normal(size=(1, 24, D))))
    other = x.at[:, 11:].set(jnp.asarray(rng.normal(size=(1, 13, D)), jnp.float32))
    (y, aux), (changed, _) = (apply(module, params, v) for v in (x, other))
    assert aux["moe/fraction_dropped"] > 0.3
    np.testing.assert_array_equal(y[:, :11], changed[:, :11])


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_tokens_with_null_experts_only_give_exactly_zero(rng, dispatch):
    module = AdaMoE(**SHAPE, top_k=2, num_null=3, capacity_factor=8.0, dispatch=dispatch)
    params, x = as_float32((random_params(module, rng), rng.normal(size=(B, T, D))))
    # The first feature says how much the null experts are wanted.
    kernel = params["router"]["kernel"].at[0].set(jnp.array([0.0] * 4 + [1.0] * 3))
    params["router"]["kernel"] = kernel
    wants_null = rng.random((B, T)) < 0.5
    x = x.at[..., 0].set(jnp.where(wants_null, 1e3, -1e3))
    y, aux = apply(module, params, x)
    np.testing.assert_array_equal(y[wants_null], 0.0)
    assert (jnp.abs(y[~wants_null]).max(-1) > 0).all()
    np.testing.assert_array_equal(aux["token/experts"], np.where(wants_null, 0, 2))


def test_null_experts_are_not_computed():
    """FLOPs of the compiled program: with as many null experts as true ones, half the experts."""
    d_model, fields = 32, {"num_experts": 8, "hidden_dim": 64, "top_k": 2, "capacity_factor": 1.0}
    x = jnp.zeros((2, 128, d_model))

    def flops(module):
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        compiled = jax.jit(lambda p, x: module.apply(p, x)[0]).lower(params, x).compile()
        return compiled.cost_analysis()["flops"] / 256

    one_expert = 2 * 3 * d_model * 64
    plain, half = flops(TopK(**fields)), flops(AdaMoE(**fields, num_null=8))
    assert 2 * one_expert < plain < 2.3 * one_expert
    assert one_expert < half < 1.3 * one_expert


def test_switch_jitters_the_router_in_training_only(rng):
    module = Switch(**SHAPE, gated=True, activation="silu", jitter=0.3, capacity_factor=100.0)
    params, x = as_float32((random_params(module, rng), rng.normal(size=(4, 64, D))))

    @jax.jit
    def train(seed):
        rngs = {"routing": jax.random.key(seed)}
        return module.apply({"params": params}, x, train=True, rngs=rngs)[0]

    quiet, noisy = np.asarray(apply(module, params, x)[0]), np.asarray(train(1))
    np.testing.assert_array_equal(quiet, apply(module, params, x)[0])
    np.testing.assert_array_equal(noisy, train(1))
    assert (noisy != train(2)).any()
    # Experts see x as it is: where the choice stays, y changes by the weight only.
    quiet, noisy = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (quiet, noisy))
    alike = np.isclose(np.sum(quiet * noisy, axis=-1), 1, atol=1e-4)
    assert 0.5 < alike.mean() < 1


def test_without_jitter_training_needs_no_randomness(rng):
    module = TopK(**SHAPE)
    params, x = as_float32((random_params(module, rng), rng.normal(size=(B, T, D))))
    train, evaluate = (apply(module, params, x, train=flag)[0] for flag in (True, False))
    np.testing.assert_array_equal(train, evaluate)


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [
        case
        if case in [("switch", "capacity"), ("adamoe", "dropless")]
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(MIXTURES, ["capacity", "dropless"])
    ],
)
def test_padding_goes_to_no_expert_and_counts_nowhere(rng, name, dispatch):
    """Rows with padding, wherever it is, give the text what its row without padding gives it."""
    module = MIXTURES[name][0].clone(dispatch=dispatch, capacity_factor=100.0)
    params, x = as_float32((random_params(module, rng), rng.normal(size=(B, 2 * T, D))))
    mask = np.stack([rng.permutation(2 * T) < T for _ in range(B)])
    y, aux = apply(module, params, x, mask=jnp.asarray(mask))
    text, expected = apply(module, params, x[mask].reshape(B, T, D))
    np.testing.assert_array_equal(y[~mask], 0.0)
    np.testing.assert_allclose(y[mask].reshape(B, T, D), text, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        aux.pop("token/experts")[mask], expected.pop("token/experts").ravel()
    )
    assert aux.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(aux[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["switch", "adamoe"])
def test_extreme_inputs_stay_finite(rng, name, ways):
    module = MIXTURES[name][0].clone(**ways)
    params, x = as_float32((random_params(module, rng), rng.normal(size=(B, T, D)) * 1e4))

    def loss(params):
        y, aux = module.apply({"params": params}, x)
        return jnp.mean(y) + aux["loss/load_balancing"] + aux["loss/router_z"]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_routing_is_float32_in_a_bfloat16_model(rng, ways):
    module = AdaMoE(**SHAPE, top_k=3, num_null=4).clone(**ways)
    params = as_float32(random_params(module, rng))
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.bfloat16)
    y, aux = apply(module, params, x)
    exact, expected = apply(module, params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.1, atol=0.1)
    for key, value in expected.items():
        assert aux[key].dtype == jnp.float32
        np.testing.assert_array_equal(aux[key], value)


def test_balancing_by_bias(rng):
    """Descent on the term alone evens the load; the bias moves nothing but the choice."""
    module = TopK(**SHAPE, top_k=1, balancing="bias", capacity_factor=100.0)
    params, x = as_float32((random_params(module, rng), rng.normal(size=(8, 64, D))))
    params["balance_bias"] = jnp.zeros(4)

    @jax.jit
    def step(bias):
        def loss(bias):
            y, aux = module.apply({"params": params | {"balance_bias": bias}}, x)
            return jnp.mean(y**2) + sum(v for k, v in aux.items() if k.startswith("loss/")), aux

        gradient, aux = jax.grad(loss, has_aux=True)(bias)
        assert "loss/load_balancing" not in aux
        counts = jnp.sum(jax.nn.one_hot(jnp.argmax(_probs(params, x) + bias, -1), 4), (0, 1))
        return gradient, jnp.sign(counts - jnp.mean(counts)), aux["moe/load_imbalance"]

    bias, history = params["balance_bias"], []
    for _ in range(300):
        gradient, expected, imbalance = step(bias)
        np.testing.assert_array_equal(gradient, expected)
        history.append(imbalance)
        bias = bias - 0.003 * gradient
    assert history[-1] < min(1.1, history[0])


def _probs(params, x):
    return jax.nn.softmax(x @ params["router"]["kernel"])


def test_capacity_follows_the_true_experts_expected():
    """AdaMoE's buffers are smaller by the share of null experts."""
    for module, expected in (
        (TopK(top_k=4), 4.0),
        (AdaMoE(top_k=4, num_null=24), 1.0),
        (Switch(), 1.0),
    ):
        assert module.expected_experts == expected
        assert capacity(256, module.expected_experts, 8, 1.0) == 256 * expected / 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(num_experts=4, top_k=5), r"top_k=5; valid: 1 to 4"),
        (lambda: AdaMoE(num_experts=4, num_null=2, top_k=7), r"top_k=7; valid: 1 to 6"),
        (lambda: AdaMoE(num_null=-1), r"num_null=-1; valid: at least 0"),
        (lambda: Switch(num_experts=0), r"num_experts=0; valid: at least 1"),
        (lambda: Switch(capacity_factor=0.0), r"capacity_factor=0.0; valid: greater than 0"),
        (lambda: Switch(capacity_factor=float("nan")), r"capacity_factor=nan; valid"),
        (lambda: Switch(balance_weight=-1.0), r"balance_weight=-1.0; valid: 0 or greater"),
        (lambda: Switch(jitter=1.0), r"jitter=1.0; valid: 0 <= jitter < 1"),
        (lambda: Switch(hidden_dim=0), r"hidden_dim=0; valid: None or at least 1"),
        (lambda: Switch(dispatch="droples"), r"'droples'; did you mean 'dropless'"),
        (lambda: Switch(activation="sulu"), r"'sulu'; did you mean 'silu'"),
        (lambda: TopK(balancing="biass"), r"'biass'; did you mean 'bias'"),
    ],
)
def test_bad_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
