"""Two processes in turns: attention of this library and of PyTorch 2.13 (eager), on all cores of this CPU.

PyTorch has wheels for Python 3.11 here, so that its side runs in an environment of its own that `uv` makes.
"""

import json
import os
import shlex
import statistics
import sys
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks import turns
from benchmarks.cpu_attention.shapes import RUNS, SHAPES

_TORCH = flags.DEFINE_string(
    "torch",
    "uv run --no-project --python 3.11 --with torch==2.13.0 --with numpy python",
    "Command of a Python that has torch.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each side that count.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", "benchmarks/results/cpu_attention.json", "File of the measurements."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    sides = [
        turns.Side("effjax", [sys.executable, "-m", "benchmarks.cpu_attention.ours"]),
        turns.Side(
            "torch", [*shlex.split(_TORCH.value), "-m", "benchmarks.cpu_attention.torch_side"]
        ),
    ]
    results = {}
    table = Table(title="Causal attention on CPU: median ms of forward+backward")
    for heading in ("[B, T, H, D]", "effjax", "torch", "effjax / torch"):
        table.add_column(heading, justify="left" if heading.startswith("[") else "right")
    for name in SHAPES:
        seconds = turns.compare(sides, name, _ROUNDS.value)
        seconds = {side: [x / RUNS[name] for x in taken] for side, taken in seconds.items()}
        ratio = turns.ratio(seconds, "effjax", "torch")
        results[name] = {"seconds": seconds, "ratio": ratio}
        medians = [f"{statistics.median(seconds[side.name]) * 1e3:.2f}" for side in sides]
        table.add_row(rf"\{name}", *medians, f"{ratio:.2f}")
    for side in sides:
        side.close()
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
