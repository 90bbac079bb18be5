"""`docs/SCHEDULES.md`: the static figures of our kernels beside their roofs and the best peer."""

from collections.abc import Sequence
from typing import Any

_INTRODUCTION = """\
# Schedules of the TPU kernels

Made by `python -m benchmarks.kernels --publish`, from the real TPU compiler on a CPU host, in bfloat16. **Nothing of it
has been timed on a TPU.** Cycles are the bundles that kernels and XLA issue, as if nothing stalled. One definition of
the roof for all: the higher of memory (inputs and outputs, moved once a pass) and of the busiest unit (matrix units
padded to their width, vector unit, exponentials), at the fastest way to do the pass that we know. The ratio is the
cycles over the roof; below 1 memory holds the pass, which a schedule does not see. Peer: the cycles over those of the
best public kernel that the compiler takes at that shape.
"""
_HEADING = """
## {chip}

| op | shape | pass | cycles | compute roof | memory roof | ratio | peer |
|---|---|---|--:|--:|--:|--:|--:|
"""


def document(report: dict[str, Any]) -> str:
    """The page of what `suite.run` returns."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    tables = "".join(_table(report["rows"], chip) for chip in report["chips"])
    return f"{_INTRODUCTION}{tables}\n![ratios](results/kernels.png)\n\n{versions}\n"


def _table(rows: Sequence[dict], chip: str) -> str:
    known = [row for row in rows if row["static"][chip].get("cycles")]
    lines = [_line(row, known, chip) for row in known if not row["is_peer"]]
    return _HEADING.format(chip=chip) + "".join(lines)


def _line(row: dict, known: Sequence[dict], chip: str) -> str:
    static = row["static"][chip]
    roofs = dict(static["roofs"])
    memory = roofs.pop("memory")
    unit = max(roofs, key=roofs.get)
    of_peers = [
        other["static"][chip]["cycles"]
        for other in known
        if other["is_peer"] and all(other[key] == row[key] for key in ("op", "shape", "pass"))
    ]
    peer = f"{static['cycles'] / min(of_peers):.2f}" if of_peers else ""
    cells = (
        *(row["op"], row["shape"], row["pass"], f"{static['cycles']:,}"),
        *(f"{roofs[unit]:,.0f} {unit}", f"{memory:,.0f}", f"{static['ratio']:.2f}", peer),
    )
    return f"| {' | '.join(cells)} |\n"
