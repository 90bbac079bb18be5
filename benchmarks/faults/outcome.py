"""What was done to the runs and how they took it: a row a fault, and the document made of the rows."""

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

from benchmarks.faults import CHECKPOINT_EVERY, NUM_STEPS

BITWISE = (
    "arrays, data state and log equal bit for bit to those of an undisturbed run on the same mesh"
)


@dataclasses.dataclass
class Outcome:
    """One fault.

    Attributes:
      fault: what was done.
      where: to which run, and when.
      known: how survival is known.
      tried: how often it was done.
      survived: how often the run was none the worse for it.
      notes: anything that was measured, in words.
    """

    fault: str
    where: str
    known: str = BITWISE
    tried: int = 0
    survived: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, survived: bool, count: int = 1) -> None:
        """Counts a try, or several that share one end."""
        self.tried += count
        self.survived += count * survived


def document(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The outcomes in Markdown.

    Args:
      report: by name of the fault, `seed`, `jax` (version) and `outcomes`, dicts of the fields of `Outcome`.
    """
    versions = sorted({part["jax"] for part in report.values()})
    lines = [
        "# Reliability: faults tried, and survived",
        "",
        "Made by `python -m benchmarks.faults`, which does these things to real processes of `train.py`, starts them",
        "again as a user would, and compares how they end with runs to which nothing was done.",
        "",
        f"The runs: `mor`, d_model 32, {NUM_STEPS} steps of 8 x 32 tokens, a checkpoint every {CHECKPOINT_EVERY}; "
        f"JAX {', '.join(versions)} on {platform.system()}, CPU.",
        "",
        "| fault | where | tried | survived | how it is known | seed |",
        "|---|---|--:|--:|---|--:|",
    ]
    for part in report.values():
        for one in part["outcomes"]:
            known = "; ".join([one["known"], *one["notes"]])
            cells = (one["fault"], one["where"], one["tried"], one["survived"], known, part["seed"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
