"""Trains a model and evaluates it: `uv run train.py --config=configs/mor.py`."""

from absl import flags

from effjax import cli

_CONFIG = cli.define_config("Config of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")
flags.register_validator(
    "config", lambda config: config is not None, "name a recipe, such as --config=configs/mor.py"
)


def main():
    from effjax import training  # after the flags: a wrong one is told at once

    training.fit(_CONFIG.value, _WORKDIR.value or cli.default_workdir())


if __name__ == "__main__":
    cli.run(main)
