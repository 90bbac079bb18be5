"""Evaluates a trained model: `uv run eval.py --workdir=runs/mor`."""

import logging

from absl import flags

from effjax import cli

_CONFIG = cli.define_config("Config of the evaluation; without one, that of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")


def main():
    from effjax import evaluation  # after the flags: a wrong one is told at once
    from effjax.evaluation import report

    logging.getLogger("effjax").setLevel(logging.INFO)  # says what it is at
    workdir = _WORKDIR.value or cli.default_workdir()
    found = evaluation.evaluate(_CONFIG.value, workdir)
    print(report.table(found))
    print(f"wrote {workdir}/{report.JSON_FILE} and {', '.join(found['plots'])}")


if __name__ == "__main__":
    cli.run(main)
