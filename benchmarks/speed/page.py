"""`docs/SPEED.md`, the table and the picture: all that has been measured so far."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.speed import first_step, headliners, host, imports

Report = Mapping[str, Mapping[str, Any]]
BASELINES = ("equal parameters", "equal FLOPs")

_INTRODUCTION = """\
# Speed: start-up, host, and models beside transformers of equal cost

Made by `python -m benchmarks.speed`. What is compared took turns on one machine; numbers are medians over the turns,
and ratios medians of the ratios within a turn. Only CPUs have been measured.
"""
_IMPORTS = f"""
## Imports

Seconds of a Python that does that and ends; its byte code is there. Rooms of `effjax` are imported when they are asked
for.

| program | seconds | of processors | times `{imports.PROGRAMS["jax"]}` |
|---|--:|--:|--:|
"""
_FIRST_STEP = f"""
## From the command to the first step

Seconds since `train.py --config=configs/{first_step.RECIPE}.py` was started, when nothing was compiled before (cold),
and when an earlier start left what it compiled in the cache, which is on by default (warm).

| until | cold | warm |
|---|--:|--:|
"""
_HOST = f"""
## The host's share of a step

A step so small that the devices never make the host wait, in turns of {host.STEPS}: in the loop of
`effjax.training.fit`, with its data, its checks and its log, and the same compiled program called by itself.

| | ms a step |
|---|--:|
"""
_HEADLINERS = f"""
## Models beside transformers of equal cost

Training steps on {headliners.BATCH_SIZE * headliners.SEQ_LEN:,} tokens (for `matryoshka` as many of queries, and of
code) at d_model {headliners.D_MODEL}, all else as in the tiny recipes. The transformer beside each has its width, depth
and task, and a feed-forward as wide as gives it as many parameters, or as many FLOPs a token: those really spent, where
tokens are skipped or sent to few experts. At so small a size, and on a CPU, what saves FLOPs pays for it with smaller
products.

| model | parameters | FLOPs a token, forward | steps/s | times the transformer of equal parameters | of equal FLOPs |
|---|--:|--:|--:|--:|--:|
"""
PICTURE = "results/speed.png"
_TRAINING = """
## Beside PyTorch

By `python -m benchmarks.training`: {model}, the same numbers and batches; no compiling in the time.

| | ms a step | speed of effjax |
|---|--:|--:|
"""


def document(report: Report, training: Mapping[str, Any] | None) -> str:
    """The page.

    Args:
      report: by section, `measured`, `load` and `machine`; sections may be missing.
      training: what `benchmarks.training` wrote, if it did.
    """
    page = _INTRODUCTION
    for heading, rows in (
        (_IMPORTS, _imports(report)),
        (_FIRST_STEP, _first_step(report)),
        (_HOST, _host(report)),
        (_HEADLINERS, _headliners(report)),
    ):
        lines = [f"| {' | '.join(row)} |\n" for row in rows]
        page += heading + "".join(lines) if lines else ""
    if any(name in report for name in headliners.RECIPES):
        page += f"\n![steps a second over those of the transformers]({PICTURE})\n"
    if training is not None:
        page += _beside_torch(training)
    return page + _conditions(report)


def table(report: Report) -> Table:
    """The measurements for the eye: what, and how much."""
    found = Table(title="Speed", show_header=False)
    for headings, rows in (
        (_IMPORTS, _imports(report)),
        (_FIRST_STEP, _first_step(report)),
        (_HOST, _host(report)),
        (_HEADLINERS, _headliners(report)),
    ):
        columns = headings.splitlines()[-2].strip("| ").split(" | ")
        for name, *values in rows:
            pairs = zip(columns[-len(values) :], values, strict=True)
            found.add_row(name.strip("`"), ", ".join(f"{column} {x}" for column, x in pairs))
    return found


def draw(report: Report, path: Path) -> None:
    """Steps a second of each headliner over those of its transformers, as PNG."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    names = [name for name in headliners.RECIPES if name in report]
    for i, baseline in enumerate(BASELINES):
        places = [x + 0.4 * i for x in range(len(names))]
        heights = [_speed(report[name]["measured"], name, baseline) for name in names]
        ax.bar(places, heights, 0.4, label=f"transformer of {baseline}")
    ax.set_xticks([x + 0.2 for x in range(len(names))], names)
    ax.axhline(1, color="#666666", linewidth=1, linestyle="--")
    ax.set(ylabel="steps/s over the transformer's", title="Training steps on a CPU")
    if names:
        ax.legend()
    figure.savefig(path, dpi=150)


def _imports(report: Report) -> Iterator[tuple[str, ...]]:
    if "imports" not in report:
        return
    measured = report["imports"]["measured"]
    for name, program in imports.PROGRAMS.items():
        seconds = measured[name]
        times = _ratio(seconds["wall"], measured["jax"]["wall"])
        yield f"`{program}`", _median(seconds["wall"]), _median(seconds["cpu"]), f"{times:.2f}"


def _first_step(report: Report) -> Iterator[tuple[str, ...]]:
    if "first_step" not in report:
        return
    measured = report["first_step"]["measured"]
    for phase in first_step.PHASES:
        yield phase, *(_median([run[phase] for run in measured[k]], 1) for k in ("cold", "warm"))


def _host(report: Report) -> Iterator[tuple[str, ...]]:
    if "host" not in report:
        return
    loop, step = (report["host"]["measured"][name] for name in ("loop", "step"))
    added = [x - y for x, y in zip(loop, step, strict=True)]
    for name, seconds in (("loop", loop), ("step alone", step), ("host", added)):
        yield name, f"{1e3 * statistics.median(seconds):.2f}"


def _headliners(report: Report) -> Iterator[tuple[str, ...]]:
    for name in headliners.RECIPES:
        if name not in report:
            continue
        measured = report[name]["measured"]
        own = measured[name]
        yield (
            f"`{name}`",
            f"{own['parameters']:,}",
            f"{own['flops_per_token']:,.0f}",
            f"{1 / statistics.median(own['seconds_per_step']):.2f}",
            *(f"{_speed(measured, name, baseline):.2f}" for baseline in BASELINES),
        )


def _beside_torch(training: Mapping[str, Any]) -> str:
    model = ", ".join(f"{name} {value}" for name, value in training["model"].items())
    lines = [
        f"| {name} | {1e3 * statistics.median(seconds):.0f} | {training['speed'][name]:.2f} |\n"
        for name, seconds in training["seconds_per_step"].items()
    ]
    return _TRAINING.format(model=model) + "".join(lines)


def _conditions(report: Report) -> str:
    machines = sorted({section["machine"] for section in report.values()})
    busiest = max((section["load"] for section in report.values()), default=0.0)
    return (
        f"\nMeasured on {'; '.join(machines)}. Before a section began, the system's load was {busiest:.1f} at most; "
        "what the benchmark itself did in the minute before counts in it.\n"
    )


def _speed(measured: Mapping[str, Mapping[str, Any]], name: str, baseline: str) -> float:
    """Steps a second of the headliner over those of a baseline."""
    return _ratio(measured[baseline]["seconds_per_step"], measured[name]["seconds_per_step"])


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(values, others, strict=True))


def _median(seconds: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(seconds):.{digits}f}"
