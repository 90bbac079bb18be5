import importlib
import pathlib

import jax
import numpy as np
import pytest

from effjax import models, pytree
from effjax.training import config as configs

_FOLDER = pathlib.Path(__file__).parents[2] / "configs"
RECIPES = sorted(p.stem for p in _FOLDER.glob("[a-z]*.py") if p.stem != "uptrain")  # needs a folder


def recipe(name):
    return importlib.import_module(f"configs.{name}")


def sizes():
    """Every size of every recipe, those between the smallest and the largest for `-m slow`."""
    for name in RECIPES:
        named = list(getattr(recipe(name), "SIZES", ()))
        for size in (None, *named):
            is_between = size in named[1:-1]
            yield pytest.param(name, size, marks=[pytest.mark.slow] if is_between else [])


@pytest.mark.parametrize(("name", "size"), list(sizes()))
def test_every_recipe_describes_a_model_that_can_be_built(name, size):
    config = configs.resolve(recipe(name).get_config(size))
    model = models.create(**config["model"])
    tokens = np.zeros((1, 16), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    millions = pytree.count(shapes) / 1e6
    if size is None:
        assert 0.1 < millions < 10
        config["mesh"]["data"] = 1
        configs.check(config)
    elif name in ("transformer", "mamba", "mamba2"):
        # Mamba-2's name "1.3b" is cut off, not rounded.
        stated = float(size[:-1]) * (1000 if size.endswith("b") else 1)
        stated = {("mamba2", "1.3b"): 1344}.get((name, size), stated)
        np.testing.assert_allclose(millions, stated, rtol=0.021)


@pytest.mark.parametrize(("name", "size"), list(sizes()))
def test_only_tiny_recipes_hold_all_logits(name, size):
    model = configs.resolve(recipe(name).get_config(size))["model"]
    if "chunk_size" in model["head"]:
        assert (model["head"]["chunk_size"] or model["vocab_size"]) < model[
            "vocab_size"
        ] or not size


def test_shared_parameters_make_recursive_models_smaller():
    def count(name):
        model = models.create(**configs.resolve(recipe(name).get_config("360m"))["model"])
        tokens = np.zeros((1, 16), np.int32)
        return pytree.count(jax.eval_shape(model.init, jax.random.key(0), tokens))

    # 360M shapes: 12 unique layers of 32, and routers of 960 numbers each
    assert count("recursive") < 0.5 * count("transformer")
    assert count("mor") - count("recursive") == 3 * 960


def test_composition_from_one_argument():
    config = recipe("compose").get_config("mixers=short_conv+attention,ffn=adamoe,num_layers=6")
    model = models.create(**configs.resolve(config.model))
    assert [type(m).__name__ for m in model.mixers] == ["ShortConv", "Attention"]
    assert (type(model.ffn).__name__, model.num_layers) == ("AdaMoE", 6)


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("mor", "36m", "unknown size '36m'; did you mean '360m'"),
        ("compose", "fn=adamoe", "unknown part 'fn=adamoe'"),
        ("compose", "ffn=adamo", "did you mean 'adamoe'"),
    ],
)
def test_a_wrong_argument_says_what_is_valid(name, argument, message):
    with pytest.raises(ValueError, match=message):
        recipe(name).get_config(argument)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("training.num_steps", 0, "training.num_steps=0; valid: 1 or more"),
        ("training.ema_decay", 1.0, "training.ema_decay=1.0; valid: between 0 and 1"),
        (
            "training.nonfinite",
            "skp",
            "training.nonfinite: unknown choice 'skp'; did you mean 'skip'",
        ),
        ("training.max_skipped", 0, "training.max_skipped=0; valid: 1 or more"),
        ("data.seq_len", 4096, "data.seq_len=4096 is longer than model.max_seq_len=2048"),
        ("model.vocab_size", 100, "model.vocab_size=100 is smaller.*260 or more"),
        ("data.batch_size", 6, "data.batch_size=6; valid: a multiple of 4"),
        ("mesh.tensor", 64, "needs .* devices, and there are"),
    ],
)
def test_check_names_field_value_and_what_is_valid(field, value, message):
    config = configs.default("transformer")
    config.mesh.data = 4
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        configs.check(config)


def test_rows_have_to_divide_by_the_devices_along_them():
    config = configs.default("transformer")
    config.mesh.update(data=1, context=3)
    length = config.data.seq_len
    with pytest.raises(
        ValueError, match=f"data.seq_len={length}; valid: a multiple of mesh.context=3"
    ):
        configs.check(config)


def test_check_finds_unknown_and_missing_fields():
    config = configs.resolve(configs.default("transformer"))
    config["trainig"] = {}
    with pytest.raises(ValueError, match="did you mean 'training'"):
        configs.check(config)
    del config["trainig"], config["training"]["keep"]
    with pytest.raises(ValueError, match=r"config\.training: missing keep"):
        configs.check(config)


def test_optional_fields_take_values_of_their_type():
    config = configs.default("transformer")
    config.model.mixers[0].window = 5
    config.model.ffn.hidden_dim = 64
    assert configs.resolve(config)["model"]["mixers"][0]["window"] == 5
    with pytest.raises(TypeError):
        config.model.ffn.hidden_dim = "wide"
