"""Tries every fault, prints what came of it, and writes `docs/RELIABILITY.md` and JSON.

The faults are independent of each other: `--only` tries some of them anew and keeps what is known of the others.
"""

import dataclasses
import json
import secrets
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from benchmarks.faults.bench import Bench
from benchmarks.faults.catalogue import FAULTS
from benchmarks.faults.outcome import Outcome, document

_KILLS = flags.DEFINE_integer("kills", 24, "SIGKILLs of a run of one process.", lower_bound=1)
_TRIES = flags.DEFINE_integer(
    "tries", 3, "Tries of the faults that are not SIGKILL.", lower_bound=1
)
_ONLY = flags.DEFINE_multi_enum("only", list(FAULTS), list(FAULTS), "Faults to try; default: all.")
_SEED = flags.DEFINE_integer("seed", None, "Of everything random; a fresh one by default.")
_OUT = flags.DEFINE_string("out", "benchmarks/results/faults.json", "Where the outcomes go.")
_DOCUMENT = flags.DEFINE_string("document", "docs/RELIABILITY.md", "Where the table goes.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # of what reads checkpoints to compare them
    seed = secrets.randbelow(2**31) if _SEED.value is None else _SEED.value
    console = Console(stderr=True)
    console.print(f"seed {seed}")
    report = read(Path(_OUT.value))
    with tempfile.TemporaryDirectory(prefix="effjax-faults-") as folder:
        bench = Bench(Path(folder), np.random.default_rng(seed), console)
        for name in _ONLY.value:
            found = FAULTS[name](bench, _KILLS.value if name == "killed" else _TRIES.value)
            outcomes = [dataclasses.asdict(one) for one in found]
            report[name] = {"seed": seed, "jax": jax.__version__, "outcomes": outcomes}
            report = {name: report[name] for name in FAULTS if name in report}
            write(Path(_OUT.value), json.dumps(report, indent=2) + "\n")
            write(Path(_DOCUMENT.value), document(report))
            console.print(table(found))
    console.print(f"wrote {_OUT.value} and {_DOCUMENT.value}")
    known = [one for part in report.values() for one in part["outcomes"]]
    sys.exit(any(one["survived"] < one["tried"] for one in known))


def table(outcomes: list[Outcome]) -> Table:
    """The outcomes for the eye."""
    found = Table()
    for name in ("fault", "where", "tried", "survived"):
        found.add_column(name)
    for one in outcomes:
        found.add_row(one.fault, one.where, str(one.tried), str(one.survived))
    return found


def read(path: Path) -> dict:
    """What is known from earlier; nothing where there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, text: str) -> None:
    """Writes a file and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    app.run(main)
