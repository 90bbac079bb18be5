"""Models made from dense ones: tied layers against NumPy, up-cycled experts against the function that they copy."""

import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import tensors
from safetensors.numpy import save_file

from effjax.depth import ExpertChoice, MixtureOfRecursions, Recursive, TokenChoice
from effjax.depth.sharing import STRATEGIES, Layout
from effjax.ffn import AdaMoE, Dense, Gated, Switch, TopK
from effjax.interop import load_hf, save_hf
from effjax.mixers import Attention, ShortConv
from effjax.models import DecoderLM, uptrain
from effjax.models.layer_tying import INITIALISATIONS, tied_layers
from effjax.models.uptraining import convert

LAYERS, RECURSIONS = 6, 2
DENSE = DecoderLM(
    vocab_size=30,
    d_model=16,
    num_layers=LAYERS,
    mixers=(Attention(2, num_kv_heads=1),),
    ffn=Gated(hidden_dim=24),
    max_seq_len=32,
)
SMALL = DENSE.clone(num_layers=1)


def drawn(model, rng, dtype="float32"):
    """Variables of a model, drawn at random."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def flat(variables):
    return flax.traverse_util.flatten_dict(dict(variables["params"]), sep="/")


@functools.cache
def forward(model):
    return jax.jit(lambda variables, tokens: model.apply(variables, tokens).logits)


def output(ffn, params, x):
    """What a feed-forward makes of x."""
    return jax.jit(lambda params, x: ffn.apply({"params": params}, x)[0])(params, x)


def source_layers(strategy, initialisation, num_layers, num_recursions):
    """For each layer of the recursive model the dense layers that it is the mean of, as the papers put it in words."""
    ends = 1 if strategy.startswith("middle") else 0
    inner = range(ends, num_layers - ends)
    count = len(inner) // num_recursions
    if strategy.endswith("cycle"):
        block_of = [i % count for i in range(len(inner))]
    else:
        block_of = [i // num_recursions for i in range(len(inner))]
    chosen = {
        "stepwise": [[round(i)] for i in np.linspace(inner[0], inner[-1], count).tolist()],
        "lower": [[i] for i in inner[:count]],
        "upper": [[i] for i in inner[-count:]],
        "average": [
            [i for i, b in zip(inner, block_of, strict=True) if b == k] for k in range(count)
        ],
    }[initialisation]
    outer = [[0]] * ends, [[num_layers - 1]] * ends
    return outer[0] + [chosen[b] for b in block_of] + outer[1]


def test_what_a_shared_block_begins_as(rng):
    layout = Layout.of("middle_cycle", 8, 3)
    wanted = {
        "stepwise": ((1,), (6,)),
        "average": ((1, 3, 5), (2, 4, 6)),
        "lower": ((1,), (2,)),
        "upper": ((5,), (6,)),
    }
    assert {name: tied_layers(layout, name) for name in INITIALISATIONS} == wanted
    for strategy in STRATEGIES:
        count, repeats = (int(n) for n in rng.integers(1, 7, 2))
        num_layers = count * repeats + (2 if strategy.startswith("middle") else 0)
        layout = Layout.of(strategy, num_layers, repeats)
        for name in INITIALISATIONS:
            blocks = [layer for layers in layout.shared for layer in layers]
            of = dict(zip(blocks, tied_layers(layout, name), strict=True))
            found = [list(of.get(use, (use,))) for use in layout.layers]
            assert found == source_layers(strategy, name, num_layers, repeats)
            # Without sharing all begins as what it was.
            untied = Layout.of("untied", count * repeats, repeats)
            assert tied_layers(untied, name) == tuple((i,) for i in range(count * repeats))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with a dense model."""
    seed = np.random.SeedSequence().entropy
    print(f"folder seed: {seed}")
    path = tmp_path_factory.mktemp("dense") / "folder"
    save_hf(path, DENSE, drawn(DENSE, np.random.default_rng(seed)))
    return path


def tied_folder(path, folder, sources):
    """A folder with a dense model whose layers are means of those of another, made in NumPy."""
    path.mkdir()
    given = tensors(folder)
    tied = {}
    for name, tensor in given.items():
        number = re.search(r"layers\.(\d+)\.", name)
        if number:
            names = [
                name.replace(number[0], f"layers.{source}.") for source in sources[int(number[1])]
            ]
            tensor = np.mean([given[n].astype(np.float64) for n in names], axis=0)
        tied[name] = np.asarray(tensor, np.float32)
    save_file(tied, path / "model.safetensors")
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return path


@pytest.mark.parametrize(
    "strategy",
    [
        "middle_cycle",
        *(
            pytest.param(strategy, marks=pytest.mark.slow)
            for strategy in STRATEGIES
            if strategy != "middle_cycle"
        ),
    ],
)
def test_recursive_models_compute_what_dense_ones_with_tied_layers_do(
    strategy, folder, tmp_path, rng
):
    dense, variables = load_hf(folder, scan_layers=True)
    tokens = rng.integers(30, size=(2, 9))
    for name in INITIALISATIONS:
        sources = source_layers(strategy, name, LAYERS, RECURSIONS)
        tied = load_hf(tied_folder(tmp_path / name, folder, sources), scan_layers=True)
        model, tied_variables = uptrain(
            dense,
            variables,
            depth={"name": "recursive", "num_recursions": RECURSIONS, "sharing": strategy},
            initialisation=name,
            key=jax.random.key(0),
        )
        wanted = forward(tied[0])(tied[1], tokens)
        actual = forward(model)(tied_variables, tokens)
        np.testing.assert_allclose(actual, wanted, atol=1e-4)
        assert np.abs(forward(dense)(variables, tokens) - wanted).max() > 0.01


@pytest.mark.parametrize(
    ("routing", "names"),
    [
        (
            ExpertChoice(selection="aux_router"),
            ["aux_router_0", "aux_router_1", "router_0", "router_1"],
        ),
        pytest.param(
            TokenChoice(router="mlp", balancing="loss_free"),
            ["balance_bias", "router"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mor_is_the_recursive_model_with_fresh_routers(routing, names, rng):
    dense = DENSE.clone(num_layers=4)
    variables = drawn(dense, rng)
    depth = MixtureOfRecursions(RECURSIONS, "middle_cycle", routing)
    made = {
        seed: flat(uptrain(dense, variables, depth=depth, key=jax.random.key(seed))[1])
        for seed in (0, 1)
    }
    recursive = Recursive(RECURSIONS, "middle_cycle")
    plain = flat(uptrain(dense, variables, depth=recursive, key=jax.random.key(0))[1])
    fresh = {path: leaf for path, leaf in made[0].items() if path.startswith("depth/routing/")}
    assert sorted({path.split("/")[2] for path in fresh}) == names
    assert made[0].keys() - fresh.keys() == plain.keys()
    for path, leaf in plain.items():
        np.testing.assert_array_equal(made[0][path], leaf)
    for path, leaf in fresh.items():
        if path.endswith("kernel"):
            assert 0.005 < np.std(leaf) < 0.04, path
            assert not np.array_equal(leaf, made[1][path]), path


@pytest.mark.parametrize(
    "ffn",
    [
        pytest.param(Switch(4, renormalise=True, dispatch="dropless"), marks=pytest.mark.slow),
        pytest.param(TopK(4, top_k=2, capacity_factor=2.0), marks=pytest.mark.slow),  # room for all
        AdaMoE(num_experts=4, num_null=2, top_k=3, dispatch="dropless"),
    ],
)
def test_up_cycled_models_begin_as_the_dense_one(ffn, rng):
    variables, tokens = drawn(SMALL, rng), rng.integers(30, size=(2, 9))
    model, made = uptrain(SMALL, variables, ffn=ffn, key=jax.random.key(0))
    wanted = np.asarray(forward(SMALL)(variables, tokens))
    assert wanted.std() > 0.1
    np.testing.assert_allclose(forward(model)(made, tokens), wanted, atol=1e-5)


def test_a_switch_as_published_begins_as_the_dense_one_times_the_probability(rng):
    dense = Gated(hidden_dim=24)
    x = rng.normal(size=(2, 9, 16)).astype(np.float32)
    variables = drawn(SMALL, rng)
    model, made = uptrain(
        SMALL, variables, ffn=Switch(num_experts=4, dispatch="dropless"), key=jax.random.key(0)
    )
    before, after = (v["params"]["depth"]["layers"]["blocks_0"]["ffn"] for v in (variables, made))
    logits = x.astype(np.float64) @ np.asarray(after["router"]["kernel"], np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    probability = exp.max(-1) / exp.sum(-1)
    y = output(dense, before, x)
    routed = output(model.ffn, after, x)
    np.testing.assert_allclose(routed, y * probability[..., None], atol=1e-5)
    # With the weight renormalised the output is the dense one's, and the router learns from it all the same.
    one = model.ffn.clone(renormalise=True)

    def total(kernel):
        y, _ = one.apply({"params": {**after, "router": {"kernel": kernel}}}, x)
        return jnp.sum(y), y

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
        after["router"]["kernel"]
    )
    np.testing.assert_allclose(found, y, atol=1e-5)
    chosen = np.eye(4)[logits.argmax(-1)]
    toward = (chosen - exp / exp.sum(-1, keepdims=True)) * np.asarray(y).sum(-1)[..., None]
    np.testing.assert_allclose(gradient, np.einsum("btd,bte->de", x, toward), atol=1e-3)


def test_tokens_of_null_experts_alone_are_the_only_ones_that_change(rng):
    x = rng.normal(size=(2, 40, 16)).astype(np.float32)
    variables = drawn(SMALL, rng)
    ffn = AdaMoE(num_experts=2, num_null=4, top_k=2, dispatch="dropless")
    model, made = uptrain(SMALL, variables, ffn=ffn, key=jax.random.key(0))
    before, after = (v["params"]["depth"]["layers"]["blocks_0"]["ffn"] for v in (variables, made))
    chosen = np.argsort(-(x @ np.asarray(after["router"]["kernel"])), axis=-1)[..., :2]
    has_true = (chosen < 2).any(-1)
    assert 0 < has_true.sum() < has_true.size
    y = output(Gated(hidden_dim=24), before, x)
    np.testing.assert_allclose(output(model.ffn, after, x), y * has_true[..., None], atol=1e-5)


def test_a_mixture_keeps_its_experts_when_it_gets_null_ones(rng):
    mixture = SMALL.clone(ffn=TopK(num_experts=4, hidden_dim=24))
    variables = drawn(mixture, rng)
    model, made = uptrain(mixture, variables, ffn="adamoe", key=jax.random.key(0))
    assert (model.ffn.num_experts, model.ffn.num_null, model.ffn.hidden_dim) == (4, 8, 24)
    before, after = flat(variables), flat(made)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if path.endswith("router/kernel"):
            assert after[path].shape == (16, 12)
            assert np.std(after[path][:, 4:]) > 0
            np.testing.assert_array_equal(after[path][:, :4], leaf)
        else:
            np.testing.assert_array_equal(after[path], leaf)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scanned_layers_are_the_others_stacked(dtype, rng):
    """From and to either layout, layers tied and up-cycled in one go."""
    changes = {"depth": Recursive(2, "cycle"), "ffn": Switch(4), "initialisation": "average"}
    dense, key = DENSE.clone(num_layers=4), jax.random.key(0)
    variables = drawn(dense, rng, dtype)
    model, made = uptrain(dense, variables, key=key, **changes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made)} == {dtype}
    layers = [variables["params"]["depth"]["layers"][f"blocks_{i}"] for i in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    scanned = {"params": {**variables["params"], "depth": {"layers": {"blocks_0": stacked}}}}
    source, target = (m.clone(scan_layers=True) for m in (dense, model))

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def converted(source, variables, target):
        return convert(source, variables, target, initialisation="average", key=key)

    kept = flat(converted(source, scanned, model))
    # Within one program rounding may differ.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2 if dtype == "bfloat16" else 1e-6),
        kept,
        flat(made),
    )
    found = converted(dense, variables, target)["params"]
    shared = [made["params"]["depth"]["shared"][f"blocks_{i}"] for i in range(2)]
    wanted = flat({"params": jax.tree.map(lambda *leaves: np.stack(leaves), *shared)})
    for path, leaf in flat({"params": found["depth"]["shared"]["blocks_0"]}).items():
        assert leaf.shape == wanted[path].shape
        if path != "ffn/router/kernel":  # drawn for the whole stack at once
            np.testing.assert_allclose(
                leaf, wanted[path], rtol=1e-2 if dtype == "bfloat16" else 1e-6
            )


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (
            DENSE,
            {"depth": Recursive(4, "cycle")},
            "num_layers=6 with sharing='cycle' .*valid: num_layers of 4, 8, 12",
        ),
        (
            DENSE.clone(depth=Recursive(2, "cycle")),
            {"depth": Recursive(2, "cycle")},
            "depth=.*'recursive'.* of the model to start from; valid: 'plain'",
        ),
        (
            DENSE.clone(mixers=(Attention(2), ShortConv())),
            {"depth": Recursive(2, "sequence")},
            "layers 0 and 1 would share parameters, and have the mixers .*'attention'.*'short_conv'",
        ),
        (
            DENSE,
            {"depth": Recursive(2, "cycle"), "initialisation": "avrage"},
            "did you mean 'average'",
        ),
        (
            DENSE.clone(ffn=Gated(use_bias=True)),
            {"ffn": "switch"},
            "ffn.use_bias=True .*valid: False",
        ),
        (DENSE, {"ffn": Dense()}, "ffn=.*'dense'.*; valid: .*'gated'.*, or a mixture of experts"),
        (DENSE.clone(ffn=None), {"ffn": "adamoe"}, "ffn=.*'adamoe'.*; valid: None"),
        (DENSE, {"ffn": TopK(shared_hidden_dim=8)}, "ffn.shared_hidden_dim=8; valid: None"),
        (DENSE, {"ffn": "swich"}, "unknown ffn 'swich'; did you mean 'switch'"),
    ],
)
def test_what_cannot_be_made_is_named(source, changes, message):
    with pytest.raises(ValueError, match=message):
        uptrain(source, {"params": {}}, key=jax.random.key(0), **changes)


def test_models_that_differ_otherwise_are_refused():
    target = DENSE.clone(mixers=(Attention(2, num_kv_heads=2),))
    with pytest.raises(ValueError, match=r"mixers.0.num_kv_heads=2; valid: 1, as in the model"):
        convert(DENSE, {"params": {}}, target, key=jax.random.key(0))
