"""Runs that start from a Hugging Face folder: `configs/uptrain.py`, and `config.init_from` in general."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from tiny_run import bits, curve, on_text, train

from configs.uptrain import TARGETS, get_config
from effjax import data, models, registry
from effjax.interop import load_hf, save_hf
from effjax.mixers import Attention
from effjax.models import DecoderLM
from effjax.training import config as configs
from effjax.training import initial, sharding

DENSE = DecoderLM(d_model=16, num_layers=2, mixers=(Attention(2, num_kv_heads=1),), max_seq_len=64)


@pytest.fixture(scope="module")
def rng_of_module():
    seed = np.random.SeedSequence().entropy
    print(f"module seed: {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def text(tmp_path_factory, rng_of_module):
    return tiny_run.write_text(tmp_path_factory.mktemp("text"), rng_of_module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rng_of_module):
    shapes = jax.eval_shape(DENSE.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    draw = lambda p: jnp.asarray(rng_of_module.normal(size=p.shape) * 0.2, jnp.float32)  # noqa: E731
    path = tmp_path_factory.mktemp("dense") / "folder"
    save_hf(path, DENSE, jax.tree.map(draw, shapes))
    return path


def config_of(target, folder, text, **training):
    config = on_text(get_config(f"{target}:{folder}"), text, **training)
    if target in ("switch", "adamoe"):
        config.model.ffn.num_experts = 2
    if target in ("recursive", "mor"):
        config.model.depth.update(num_recursions=2, sharing="cycle")
    return config


def tied(path, folder, of):
    """A folder with the dense model whose layer i is the mean of the layers `of[i]`, made in NumPy."""
    path.mkdir()
    shutil.copy(folder / "config.json", path)
    given = load_file(folder / "model.safetensors")

    def tensor(name):
        layer = re.search(r"(?<=layers\.)\d+", name)
        if layer is None:
            return given[name]
        names = [name.replace(f".{layer[0]}.", f".{i}.") for i in of[int(layer[0])]]
        return np.mean([given[n].astype(np.float64) for n in names], axis=0).astype(np.float32)

    save_file({name: tensor(name) for name in given}, path / "model.safetensors")
    return path


def first_loss(config, path):
    """The loss of the first batch of a run by the dense model in a folder."""
    objective = registry.build("objective", configs.resolve(config.objective))
    batch = next(data.build(config.data, split="train"))
    model, variables = load_hf(path)
    loss, _ = jax.jit(lambda v, batch: objective(model, v, batch, jax.random.key(0)))(
        variables, batch
    )
    return float(loss)


@pytest.mark.parametrize(
    ("initialisation", "of"),
    [
        ("average", [[0, 1], [0, 1]]),
        pytest.param("lower", [[0], [0]], marks=pytest.mark.slow),
    ],
)
def test_a_run_begins_with_tied_layers_and_goes_on_without_the_folder(
    initialisation, of, folder, text, tmp_path
):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = config_of("recursive", own, text, num_steps=2, log_every=1)
    config.init_from.initialisation = initialisation
    before = train(config, tmp_path / "run")
    wanted = first_loss(config, tied(tmp_path / "tied", folder, of))
    np.testing.assert_allclose(curve(before.workdir)[0]["loss"], wanted, rtol=1e-5)
    shutil.rmtree(own)
    config.training.num_steps = 3
    after = train(config, tmp_path / "run")
    assert (before.step, after.step) == (2, 3)
    assert bits(before.state.params) != bits(after.state.params)
    assert all(np.isfinite(line["loss"]) for line in curve(after.workdir))


@pytest.mark.parametrize("target", ["adamoe", pytest.param("mor", marks=pytest.mark.slow)])
def test_all_parameters_are_there_each_where_it_is_to_live(target, folder, text):
    config = config_of(target, folder, text)
    config.model.scan_layers = True
    config = configs.resolve(config)
    configs.check(config)
    model = models.create(**config["model"])
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    wanted = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    where = sharding.state_shardings(wanted, mesh)
    found = initial.parameters(config, model, where, mesh)
    kinds = jax.tree.map(lambda leaf, at: (leaf.shape, leaf.dtype, at), wanted, where)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), found) == kinds


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_trains(target, folder, text, tmp_path):
    config = config_of(target, folder, text, num_steps=2, log_every=1, ema_decay=0.9)
    run = train(config, tmp_path / "run")
    assert run.step == 2


def test_the_tokenizer_of_the_folder_reads_the_text(folder, tmp_path):
    assert get_config(f"mor:{folder}").data.tokenizer.name == "bytes"
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    )
    tokenizer = get_config(f"mor:{tmp_path / 'own'}").data.tokenizer
    assert (tokenizer.name, tokenizer.path) == (
        "huggingface",
        str(tmp_path / "own" / "tokenizer.json"),
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (None, "config: None; valid: one of transformer, recursive, mor, switch, adamoe, then"),
        ("recursve:folder", "config: 'recursve:folder'; valid: one of"),
        ("recursive", "config: 'recursive'; valid"),
        ("recursive:nowhere", "'nowhere' is no folder; valid: a local Hugging Face model folder"),
    ],
)
def test_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        get_config(argument)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_from.path", "gone", "init_from.path='gone': 'gone' is no folder; valid"),
        (
            "model.depth.num_recursions",
            3,
            "num_layers=2 with .*valid: num_layers of 3, 6",
        ),
        (
            "model.d_model",
            32,
            "init_from.path=.*d_model=32; valid: 16, as in the model to start from",
        ),
        ("model.mixers", "short_conv", "init_from.path=.*mixers.0.*; valid"),
    ],
)
def test_what_cannot_be_started_from_is_named(field, value, message, folder, text, tmp_path):
    config = config_of("recursive", folder, text)
    if field == "model.mixers":
        config.model.mixers = (configs.part_config("mixer", value),)
    else:
        config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")


def test_an_unknown_initialisation_is_named(folder, text):
    config = config_of("recursive", folder, text)
    config.init_from.initialisation = "lowest"
    with pytest.raises(
        ValueError, match=r"init_from\.initialisation: unknown .*did you mean 'lower'"
    ):
        configs.check(config)
