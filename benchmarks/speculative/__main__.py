"""Trains a target and a draft, decodes with every way of drafting, and writes a table, JSON and a picture.

The ways take turns, so that a change of the machine's speed reaches all of them alike.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.publish import publish
from benchmarks.speculative.training import Trained, build, prompts, train
from effjax.serving import Generation, Sampling, early_exit, generate, speculate

_LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the target.", lower_bound=2)
_WIDTH = flags.DEFINE_integer("width", 512, "d_model of the target, a multiple of 64.")
_STEPS = flags.DEFINE_integer("steps", 40, "Training steps of the target.", lower_bound=10)
_DRAFT_LAYERS = flags.DEFINE_integer("draft_layers", 2, "Layers of the draft.", lower_bound=1)
_DRAFT_WIDTH = flags.DEFINE_integer("draft_width", 128, "d_model of the draft, a multiple of 64.")
_DRAFT_STEPS = flags.DEFINE_integer("draft_steps", 200, "Training steps of it.", lower_bound=10)
_EXIT_LAYERS = flags.DEFINE_integer("exit_layers", 1, "Layers before the early exit.")
_DRAFT_TOKENS = flags.DEFINE_list("draft_tokens", list("1246"), "Tokens a draft, each a line.")
_EXIT_TOKENS = flags.DEFINE_list("exit_tokens", ["2", "4"], "The same for the early exit.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Texts at a time.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "Tokens of a prompt.", lower_bound=4)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 96, "Tokens of each text.", lower_bound=8)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the sampling.", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each way.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "benchmarks/results/speculative.json", "Where to write.")

Decode = Callable[..., Generation]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    room = _PROMPT_TOKENS.value + _NEW_TOKENS.value
    target = train(build(_LAYERS.value, _WIDTH.value, room), _STEPS.value, _EXIT_LAYERS.value)
    draft = train(build(_DRAFT_LAYERS.value, _DRAFT_WIDTH.value, room), _DRAFT_STEPS.value)
    decoders = ways(target, draft)
    rows = [
        row for size in map(int, _BATCH_SIZES.value) for row in measure(decoders, batch_size=size)
    ]
    report = {
        "platform": jax.devices()[0].device_kind,
        "temperature": _TEMPERATURE.value,
        "new_tokens": _NEW_TOKENS.value,
        "models": {"target": described(target), "draft": described(draft)},
        "exit_layers": _EXIT_LAYERS.value,
        "rows": rows,
    }
    publish(report, _OUT.value, draw, table)


def ways(target: Trained, draft: Trained) -> dict[tuple[str, int], Decode]:
    """From (what drafts, tokens a draft) to the function that decodes; ("none", 0) is `generate`."""
    early = early_exit(target.model, target.variables, num_layers=_EXIT_LAYERS.value)
    drafts = {
        "draft": (draft.model, draft.variables, _DRAFT_TOKENS.value),
        "early exit": (*early, _EXIT_TOKENS.value),
    }
    own = (target.model, target.variables)
    found = {("none", 0): functools.partial(generate, *own)}
    for name, (*pair, counts) in drafts.items():
        for count in map(int, counts):
            found[name, count] = functools.partial(speculate, *own, *pair, num_draft_tokens=count)
    return found


def described(trained: Trained) -> dict:
    return {
        "num_layers": trained.model.num_layers,
        "d_model": trained.model.d_model,
        "parameters": sum(x.size for x in jax.tree.leaves(trained.variables)),
        "bits_per_byte": trained.bits_per_byte,
    }


def measure(decoders: dict[tuple[str, int], Decode], batch_size: int) -> list[dict]:
    """Tokens a second of each way, the median over the rounds, and what stayed of its drafts."""
    texts = prompts(batch_size, _PROMPT_TOKENS.value)
    options = {
        "prompts": texts,
        "max_new_tokens": _NEW_TOKENS.value,
        "sampling": Sampling(temperature=_TEMPERATURE.value),
    }
    seconds = {way: [] for way in decoders}
    found = {way: [] for way in decoders}
    turns = range(_ROUNDS.value + 1)
    for turn in track(turns, f"batch {batch_size}", console=Console(stderr=True)):
        for way, decode in decoders.items():
            start = time.perf_counter()
            result = decode(**options, key=jax.random.key(turn))
            if turn:  # the first compiles
                seconds[way].append(time.perf_counter() - start)
                found[way].append(result)
    return [row_of(way, batch_size, seconds[way], found[way]) for way in decoders]


def row_of(way: tuple[str, int], batch_size: int, seconds: list[float], found: list) -> dict:
    rates = [result.lengths.sum() / s for result, s in zip(found, seconds, strict=True)]
    row = {"drafts": way[0], "draft_tokens": way[1], "batch_size": batch_size}
    row["tokens_per_second"] = float(statistics.median(rates))
    if way[1]:
        total = lambda field: int(np.sum([getattr(result, field) for result in found]))  # noqa: E731
        row["acceptance"] = total("accepted") / total("drafted")
        row["tokens_per_pass"] = 1 + total("accepted") / total("passes")
    return row


def table(report: dict) -> Table:
    """The measurements for the eye."""
    found = Table(title=f"Tokens a second on {report['platform']}, all rows together")
    for name in ("batch", "drafts", "tokens a draft", "tokens/s", "times", "stay", "tokens a pass"):
        found.add_column(name, justify="right")
    alone = {
        r["batch_size"]: r["tokens_per_second"] for r in report["rows"] if r["drafts"] == "none"
    }
    for row in report["rows"]:
        rate = row["tokens_per_second"]
        cells = [str(row["batch_size"]), row["drafts"], str(row["draft_tokens"]), f"{rate:.1f}"]
        cells.append(f"{rate / alone[row['batch_size']]:.2f}")
        if row["draft_tokens"]:
            cells += [f"{row['acceptance']:.0%}", f"{row['tokens_per_pass']:.2f}"]
        found.add_row(*cells)
    found.caption = "; ".join(
        f"{name}: {m['num_layers']} x {m['d_model']}, {m['parameters'] / 1e6:.1f} M parameters, "
        f"{m['bits_per_byte']:.2f} bits a byte"
        for name, m in report["models"].items()
    )
    return found


def draw(report: dict, path: Path) -> None:
    """Speed and acceptance against the length of a draft, as PNG."""
    sizes = sorted({row["batch_size"] for row in report["rows"]})
    figure = Figure(figsize=(3.6 * (len(sizes) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(sizes) + 1)
    for ax, size in zip(axes, sizes, strict=False):
        for name, rows in by_drafts(report, size).items():
            rates = [row["tokens_per_second"] for row in rows]
            if name == "none":
                ax.axhline(rates[0], color="black", linestyle="--", label="generate")
            else:
                ax.plot([row["draft_tokens"] for row in rows], rates, marker="o", label=name)
        ax.set(
            title=f"batch {size}", xlabel="tokens a draft", ylabel="tokens a second", ylim=(0, None)
        )
    for name, rows in by_drafts(report, sizes[0]).items():
        if name != "none":
            shares = [row["acceptance"] for row in rows]
            axes[-1].plot([row["draft_tokens"] for row in rows], shares, marker="o", label=name)
    axes[-1].set(title="drafts that stay", xlabel="tokens a draft", ylim=(0, 1))
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend()
    target = report["models"]["target"]
    figure.suptitle(
        f"{target['num_layers']} x {target['d_model']} on {report['platform']}, "
        f"temperature {report['temperature']:g}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def by_drafts(report: dict, batch_size: int) -> dict[str, list[dict]]:
    found = {}
    for row in report["rows"]:
        if row["batch_size"] == batch_size:
            found.setdefault(row["drafts"], []).append(row)
    return found


if __name__ == "__main__":
    app.run(main)
