"""What pages of Markdown show: blocks of code, and the commands in them."""

import re
import shlex
from pathlib import Path

from absl import flags

from effjax import cli, models
from effjax.training import config as configs

ROOT = Path(__file__).parents[1]


def blocks(path, language):
    """The blocks of a language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", Path(path).read_text("utf-8"), re.DOTALL)


def train_commands(path):
    """The different `train.py ...` on a page, sorted."""
    shell = "".join(blocks(path, "bash")).replace("\\\n", " ")
    return sorted(set(re.findall(r"uv run (?:--extra \w+ )?(train\.py .*)", shell)))


def model_of(command):
    """The model that a command would train; every flag of it has to be one, and to fit the config."""
    program, *given = shlex.split(command, comments=True)
    defined = "".join((ROOT / file).read_text() for file in (program, "effjax/cli.py"))
    argv = [program]
    for flag in given:
        name = flag.removeprefix("--").partition("=")[0]
        if name.partition(".")[0] == "config":
            argv.append(flag)
        else:
            assert f'"{name}"' in defined, f"{program} has no flag --{name}"
    values = flags.FlagValues()
    holder = cli.define_config("A config.", values, argv)
    cli.parse_flags(argv, values)
    return models.create(**configs.resolve(holder.value.model))
