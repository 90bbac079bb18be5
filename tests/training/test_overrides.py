"""Flags name parts, which then have fields of their own, and say `none` where None is valid."""

from pathlib import Path

import pytest
from absl import flags

from effjax import cli, models, registry
from effjax.training import config as configs
from effjax.training import overrides

ROOT = Path(__file__).parents[2]
ROUTING = "model.depth.routing"


def prepared(*named, model="mor"):
    config = configs.default(model)
    overrides.prepare(config, named)
    return config


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        (ROUTING, "routing", "token_choice"),
        ("model.depth", "depth", "recursive"),
        ("model.mixers[0]", "mixer", "mamba2"),
        ("model.ffn", "ffn", "adamoe"),
        ("optimizer.schedule", "schedule", "warmup_stable_decay"),
        ("data.source", "source", "associative_recall"),
    ],
)
def test_a_part_that_is_named_has_its_own_fields(path, kind, name):
    config = prepared((f"{path}.name", name))
    section = config
    for key in path.replace("[", ".").replace("]", "").split("."):
        section = section[int(key) if key.isdecimal() else key]
    assert section.name == name
    assert set(section) - {"name"} == set(registry.fields(registry.lookup(kind, name)))
    registry.build(kind, configs.resolve(section))
    models.create(**configs.resolve(config)["model"])


def test_models_and_optimizers_are_named_too():
    config = prepared(("model.name", "mamba2"), ("optimizer.name", "lion"))
    assert configs.resolve(config.model) == configs.resolve(configs.model_config("mamba2"))
    assert configs.resolve(config.optimizer) == configs.resolve(configs.optimizer_config("lion"))


def test_parts_within_parts_whatever_their_order_on_the_command_line():
    names = (f"{ROUTING}.name", "token_choice"), ("model.depth.name", "mixture_of_recursions")
    config = prepared(*names, model="transformer")
    assert config.model.depth.routing.name == "token_choice"


def test_the_part_that_is_there_keeps_its_values():
    config = configs.default("mor", depth={"num_recursions": 2})
    overrides.prepare(config, [("model.depth.name", "mixture_of_recursions")])
    assert config.model.depth.num_recursions == 2


def test_what_a_part_needs_is_a_field_to_set():
    config = prepared(("data.source.name", "text"))
    assert config.data.source.paths is None
    config.data.source.paths = ("a.txt",)


def test_an_unknown_part_is_one_message():
    with pytest.raises(
        ValueError, match=r"config.model.depth.routing.name: unknown routing 'token'"
    ):
        prepared((f"{ROUTING}.name", "token"))


def test_none_is_none_where_that_is_valid_and_else_a_word():
    config = configs.default("transformer")
    config.model.mixers[0].implementation = "xla"
    config.init_from.path = "folder"
    named = ("model.mixers[0].implementation", "none"), ("training.nonfinite", "none")
    overrides.prepare(config, [*named, ("training.ema_decay", "none"), ("no.such", "none")])
    assert config.model.mixers[0].implementation is None
    assert (
        config.training.nonfinite == "stop"
    )  # until its flag sets the word, and the check refuses it
    assert config.training.ema_decay is None


def test_flags_set_the_fields_of_the_part_that_they_name():
    argv = ["program", f"--config={ROOT}/configs/mor.py"]
    argv += [f"--config.{ROUTING}.balancing=loss_free", f"--config.{ROUTING}.name=token_choice"]
    argv += ["--config.model.mixers[0].implementation=none", "--config.training.nonfinite=none"]
    flag_values = flags.FlagValues()
    holder = cli.define_config("A config.", flag_values, argv)
    cli.parse_flags(argv, flag_values)
    config = holder.value
    assert (config.model.depth.routing.name, config.model.depth.routing.balancing) == (
        "token_choice",
        "loss_free",
    )
    assert config.model.mixers[0].implementation is None
    assert config.training.nonfinite == "none"
    assert config.is_locked
    with pytest.raises(ValueError, match=r"training\.nonfinite: unknown choice 'none'"):
        configs.check(config)
