"""Trains a model and evaluates it: `uv run train.py --config=configs/mor.py`."""

from absl import flags

from effjax import cli, huge_pages

_CONFIG = cli.define_config("Config of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")
_JOINED = cli.define_distributed("train together")
_TOPOLOGY = flags.DEFINE_string(
    "plan.topology",
    None,
    "Plan the run for chips that need not be here, and train nothing: v5p:8x8x8, v5e:16x16, v6e:4x4, h100:2x8 (hosts "
    "x GPUs of each), or cpu for the CPU devices of this host.",
)
_PLAN = (
    flags.DEFINE_bool("plan.search", False, "Rank meshes, micro-batches and remat policies."),
    flags.DEFINE_integer("plan.decode_batch", None, "Plan decoding of so many texts instead."),
    flags.DEFINE_integer("plan.decode_context", None, "Tokens of each; default: max_seq_len."),
)
flags.register_validator(
    "config", lambda config: config is not None, "name a recipe, such as --config=configs/mor.py"
)


def main():
    from effjax import training  # after the flags: a wrong one is told at once

    workdir = _WORKDIR.value or cli.default_workdir()
    if _planned(workdir):
        return
    with _JOINED():
        training.fit(_CONFIG.value, workdir)


def _planned(workdir):
    """Whether the run was to be planned, which is done then."""
    cli.check_not_alone(_PLAN, _TOPOLOGY)
    if _TOPOLOGY.value is None:
        return False
    from effjax.training import planning

    planning.run(_CONFIG.value, _TOPOLOGY.value, workdir, *(flag.value for flag in _PLAN))
    return True


if __name__ == "__main__":
    huge_pages.restart()
    cli.run(main)
