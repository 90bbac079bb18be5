"""Three processes in turns: this library, PyTorch 2.13 eager, and PyTorch under `torch.compile`, on all cores.

They train the same model from the same numbers on the same batches, which the losses of their first steps show; then
each does a few steps in turn, many times over. Compiling is not in the measured time, nor is the first step of a turn:
what a process frees while it works comes back to it at once, and a virtual machine may have taken it after a pause.
All of them, PyTorch too, have their memory in huge pages where the kernel leaves that to programs, as `train.py` has.
PyTorch has wheels for Python 3.11 here, so that its sides run in an environment of their own that `uv` makes.
"""

import os
import shlex
import statistics
import sys
from pathlib import Path

from absl import app, flags
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import turns
from benchmarks.publish import publish
from benchmarks.training import task
from effjax import huge_pages

_TORCH = flags.DEFINE_string(
    "torch",
    "uv run --no-project --python 3.11 --with torch==2.13.0 --with numpy python",
    "Command of a Python that has torch.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Turns of each side that count.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "benchmarks/results/training.json", "File of the measurements.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch = [*shlex.split(_TORCH.value), "-m", "benchmarks.training.torch_side"]
    sides = [
        turns.Side("effjax", [sys.executable, "-m", "benchmarks.training.ours"]),
        turns.Side("torch eager", [*torch, "eager"]),
        turns.Side("torch.compile", [*torch, "compiled"]),
    ]
    losses = {side.name: side.ask("compare") for side in sides}
    parameters = {side.name: side.ask("parameters") for side in sides}
    seconds = turns.compare(sides, "train", _ROUNDS.value, before="resume")
    for side in sides:
        side.close()
    publish(
        {
            "model": {
                "num_layers": task.LAYERS,
                "d_model": task.WIDTH,
                "num_heads": task.HEADS,
                "seq_len": task.LENGTH,
                "batch_size": task.BATCH,
                "vocab_size": task.VOCABULARY,
            },
            "parameters": parameters,
            "losses": losses,
            "seconds_per_step": {
                name: [x / task.STEPS for x in taken] for name, taken in seconds.items()
            },
            "speed": {name: 1 / turns.ratio(seconds, "effjax", name) for name in seconds},
        },
        _OUT.value,
        draw,
        table,
    )


def table(report: dict) -> Table:
    """The measurements for the eye."""
    shape = ", ".join(f"{name} {value}" for name, value in report["model"].items())
    found = Table(title=f"A training step on {os.cpu_count()} CPU cores: {shape}")
    for heading in (
        "",
        "parameters",
        f"loss of step {task.COMPARED}",
        "median ms a step",
        "speed of effjax",
    ):
        found.add_column(heading, justify="right" if heading else "left")
    for name, seconds in report["seconds_per_step"].items():
        found.add_row(
            name,
            f"{report['parameters'][name]:,}",
            f"{report['losses'][name][-1]:.5f}",
            f"{statistics.median(seconds) * 1e3:.0f}",
            f"{report['speed'][name]:.2f}x",
        )
    return found


def draw(report: dict, path: Path) -> None:
    """Time of a step in each turn, as PNG."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for name, seconds in report["seconds_per_step"].items():
        ax.plot(range(1, len(seconds) + 1), [x * 1e3 for x in seconds], marker="o", label=name)
    ax.set(xlabel="turn", ylabel="ms a step", title="Training on a CPU", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    huge_pages.restart()
    app.run(main)
