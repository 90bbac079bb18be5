"""What the README shows works as it stands there."""

import re
import shlex
from pathlib import Path

import jax
import pytest
from absl import flags

from effjax import cli, models
from effjax.training import config as configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


SHELL = "".join(blocks("bash")).replace("\\\n", " ")
COMMANDS = sorted(set(re.findall(r"uv run (?:--extra \w+ )?(train\.py .*)", SHELL)))


def test_the_first_command_is_among_them():
    assert "train.py --config=configs/mor.py" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_describes_a_model(command):
    argv = shlex.split(command, comments=True)
    for own in (flag for flag in argv if flag.startswith(("--plan", "--distributed"))):
        assert f'"{own[2:].partition("=")[0]}"' in (ROOT / argv[0]).read_text()
        argv = [flag for flag in argv if flag != own]
    flag_values = flags.FlagValues()
    holder = cli.define_config("A config.", flag_values, argv)
    cli.parse_flags(argv, flag_values)
    model = models.create(**configs.resolve(holder.value.model))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 16), "int32"))
    assert shapes["params"]


def test_the_library_example_runs():
    (example,) = blocks("python")
    names = {}
    exec(example, names)
    assert names["out"].logits.shape == (1, 256, names["model"].vocab_size)
    assert names["out"].aux and names["out"].metrics
