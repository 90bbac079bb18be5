"""The measurements as a picture: times against the fastest peer, static cycles against the roofline."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.kernels.suite import fastest_peer


def save(report: dict[str, Any], path: Path) -> None:
    """Draws what `suite.run` returns, a panel for the times, if any, and one for each chip, as PNG."""
    rows = report["rows"]
    styles = _styles(rows, is_peer=False, markers="osD^") | _styles(rows, True, "x+1234")

    def time(row):
        peer = fastest_peer(rows, row)
        return row["time"]["seconds"] / peer if peer and "seconds" in row["time"] else None

    panels = {f"{chip}: static cycles / roofline": _ratio(chip) for chip in report["chips"]}
    if any("seconds" in row["time"] for row in rows):
        panels = {f"time on {report['platform']} / fastest peer's": time} | panels
    rows = [row for row in rows if any(value(row) is not None for value in panels.values())]
    cases = list(dict.fromkeys(_case(row) for row in rows))
    figure = Figure(figsize=(4 + 4 * len(panels), 2 + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for (title, value_of), ax in zip(panels.items(), axes, strict=True):
        _draw(ax, title, rows, cases, styles, value_of)
    handles = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)


def _styles(rows, is_peer: bool, markers: str) -> dict[str, dict]:
    """Colour and marker of each contender: filled ones for ours, lines for peers."""
    names = dict.fromkeys(row["implementation"] for row in rows if row["is_peer"] == is_peer)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    return {
        name: {"color": shade, "marker": marker}
        for name, shade, marker in zip(names, shades, itertools.cycle(markers), strict=False)
    }


def _ratio(chip: str) -> Callable[[dict], float | None]:
    return lambda row: row["static"][chip].get("ratio")


def _case(row: dict) -> str:
    return f"{row['op']} {row['shape']}\n{row['pass']}"


def _draw(ax: Axes, title: str, rows, cases, styles, value_of) -> None:
    """A line for each case and pass, a mark for each contender."""
    for row in rows:
        value = value_of(row)
        if value is not None:
            ax.scatter(
                value,
                cases.index(_case(row)),
                label=row["implementation"],
                **styles[row["implementation"]],
            )
    ax.axvline(1, color="0.7", zorder=0)
    ax.set(xscale="log", title=title, yticks=range(len(cases)), yticklabels=cases)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(LogLocator(2))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="y", labelsize="x-small")
