"""Time until the first step, time of the host, and steps a second of the models beside transformers of equal cost.

Writes JSON, a picture and `docs/SPEED.md`; `--only` measures some of it anew and keeps what is known of the rest. What
is compared takes turns. About five minutes on two quiet cores.
"""

import functools
import json
import os
import platform
from pathlib import Path

import jax
from absl import app, flags, logging

from benchmarks.publish import publish
from benchmarks.speed import first_step, headliners, host, imports
from benchmarks.speed.page import PICTURE, document, draw, table
from effjax import compilation, huge_pages

SECTIONS = {
    "imports": imports.measure,
    "first_step": first_step.measure,
    "host": host.measure,
    **{name: functools.partial(headliners.measure, name) for name in headliners.RECIPES},
}
_ONLY = flags.DEFINE_multi_enum("only", list(SECTIONS), list(SECTIONS), "Sections; default: all.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that count.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "benchmarks/results/speed.json", "File of the measurements.")
_TRAINING = flags.DEFINE_string(
    "training", "benchmarks/results/training.json", "What `benchmarks.training` has measured."
)
_DOCUMENT = flags.DEFINE_string("document", "docs/SPEED.md", "Where the page goes.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # the libraries of checkpoints log every file they write
    compilation.enable_cache()
    out, training, page = (Path(flag.value) for flag in (_OUT, _TRAINING, _DOCUMENT))
    report = json.loads(out.read_text()) if out.is_file() else {}
    beside_torch = json.loads(training.read_text()) if training.is_file() else None
    for section in _ONLY.value:
        print(f"{section} ...", flush=True)
        load = os.getloadavg()[0]
        report[section] = {
            "measured": SECTIONS[section](_ROUNDS.value),
            "load": load,
            "machine": _machine(),
        }
        report = {name: report[name] for name in SECTIONS if name in report}
        publish(report, out, draw, table, page.parent / PICTURE)
        page.write_text(document(report, beside_torch))
    print(f"wrote {page}")


def _machine() -> str:
    python, system = platform.python_version(), platform.system()
    return f"{os.cpu_count()} CPU cores, {system}, Python {python}, JAX {jax.__version__}"


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    huge_pages.restart()
    app.run(main)
