"""Measures the kernels: `python -m benchmarks.kernels --op=attention,softmax --quick --chips=v5e`."""

import json
from pathlib import Path

from absl import app, flags
from rich.console import Console

from benchmarks.kernels import plot, report, suite
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
_OUT = flags.DEFINE_string("out", "benchmarks/results/kernels", "Folder of the JSON and the plot.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    try:
        results = suite.run(_OP.value, _CHIPS.value, _QUICK.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(results, indent=2) + "\n")
    plot.save(results, out / "kernels.png")
    console = Console()
    console = console if console.width >= _WIDTH else Console(width=_WIDTH)
    console.print(report.tables(results))
    console.print(f"Written to {out}")


if __name__ == "__main__":
    app.run(main)
