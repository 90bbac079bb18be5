"""Measures the kernels: `python -m benchmarks.kernels --op=attention,softmax --quick --chips=v5e`."""

import json
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console

from benchmarks.kernels import page, plot, report, suite
from benchmarks.kernels.cases import CASES

# Narrower, the static table would break its names.
_WIDTH = 120

_OP = flags.DEFINE_list("op", list(CASES), "Ops to measure.")
_QUICK = flags.DEFINE_bool("quick", False, "Only the smallest shape of each op.")
_CHIPS = flags.DEFINE_list(
    "chips",
    ["v5e", "v6e"],
    "TPUs to compile for with libtpu, none needed; empty: no static figures.",
)
_TIME = flags.DEFINE_bool("time", True, "Also time what runs on this device.")
_OUT = flags.DEFINE_string("out", "benchmarks/results/kernels", "Folder of the JSON and the plot.")
_PUBLISH = flags.DEFINE_bool(
    "publish", False, "Also write docs/SCHEDULES.md, the page of the static figures, and its plot."
)


def _others(path: Path, results: dict[str, Any]) -> list[dict]:
    """Rows of the ops that were not measured now, if they were before on the same device and compiler."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if any(before[key] != results[key] for key in results if key != "rows"):
        return []
    return [row for row in before["rows"] if row["op"] not in _OP.value]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    try:
        results = suite.run(_OP.value, _CHIPS.value, _QUICK.value, times=_TIME.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    rows = [*_others(out / "kernels.json", results), *results["rows"]]
    results["rows"] = sorted(rows, key=lambda row: list(CASES).index(row["op"]))
    (out / "kernels.json").write_text(json.dumps(results, indent=2) + "\n")
    plot.save(results, out / "kernels.png")
    if _PUBLISH.value:
        Path("docs/SCHEDULES.md").write_text(page.document(results))
        plot.save(results, Path("docs/results/kernels.png"))
    console = Console()
    console = console if console.width >= _WIDTH else Console(width=_WIDTH)
    console.print(report.tables(results))
    console.print(f"Written to {out}")


if __name__ == "__main__":
    app.run(main)
