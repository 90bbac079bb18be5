"""Decodes behind ever longer texts and writes a table, JSON and a picture.

Models take turns at each context, so that a change of the machine's speed reaches all of them alike.
"""

import statistics
from pathlib import Path

import jax
from absl import app, flags
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.decoding.contexts import MODELS, SIZE, Decoder, crossover
from benchmarks.publish import publish

_CONTEXTS = flags.DEFINE_list(
    "contexts", [str(2**n) for n in range(8, 16)], "Tokens before the one that is decoded."
)
flags.register_validator(
    "contexts",
    lambda given: given and all(context.isdigit() and int(context) > 0 for context in given),
    message="valid: one or more positive integers",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Texts at a time.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 24, "Tokens decoded at each context.", lower_bound=3)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each model.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "benchmarks/results/decoding.json", "File of the measurements.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    contexts = sorted(map(int, _CONTEXTS.value))
    rows = [
        measure(c) for c in track(contexts, description="contexts", console=Console(stderr=True))
    ]
    report = {
        "platform": jax.devices()[0].device_kind,
        "size": SIZE,
        "batch_size": _BATCH_SIZE.value,
        "rows": rows,
        "crossover": {name: _crossover(rows, name) for name in MODELS if name != "attention"},
    }
    publish(report, _OUT.value, draw, table)


def measure(context: int) -> dict:
    """Median seconds a token and bytes of state of each model behind that many tokens."""
    decoders = {name: Decoder(name, _BATCH_SIZE.value, context, _STEPS.value) for name in MODELS}
    seconds = {name: [] for name in MODELS}
    for _ in range(_ROUNDS.value):
        for name, decoder in decoders.items():
            seconds[name] += decoder.seconds()
    return {
        "context": context,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "state_bytes": {name: decoder.state_bytes for name, decoder in decoders.items()},
    }


def _crossover(rows, name):
    series = {n: [row["seconds"][n] for row in rows] for n in (name, "attention")}
    return crossover([row["context"] for row in rows], series[name], series["attention"])


def table(report: dict) -> Table:
    """The measurements for the eye."""
    found = Table(title=f"Milliseconds a token, and MB of state, on {report['platform']}")
    found.add_column("context", justify="right")
    for name in MODELS:
        found.add_column(name, justify="right")
    for row in report["rows"]:
        cells = [
            f"{row['seconds'][name] * 1e3:.2f} ({row['state_bytes'][name] / 1e6:.2f})"
            for name in MODELS
        ]
        found.add_row(f"{row['context']:,}", *cells)
    found.caption = "faster than attention from: " + ", ".join(
        f"{name} {'never' if at is None else f'{at:,.0f}'}"
        for name, at in report["crossover"].items()
    )
    return found


def draw(report: dict, path: Path) -> None:
    """Time and state against context, as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    contexts = [row["context"] for row in report["rows"]]
    quantities = {"seconds": (1e3, "ms a token"), "state_bytes": (1e-6, "MB of state")}
    for ax, (key, (factor, label)) in zip(figure.subplots(1, 2), quantities.items(), strict=True):
        for name in MODELS:
            ax.plot(
                contexts,
                [row[key][name] * factor for row in report["rows"]],
                marker="o",
                label=name,
            )
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlabel="tokens of context", ylabel=label)
        ax.grid(alpha=0.3)
    ax.legend()
    size = ", ".join(f"{key} {value}" for key, value in report["size"].items())
    figure.suptitle(f"Decoding on {report['platform']}: {size}", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app.run(main)
