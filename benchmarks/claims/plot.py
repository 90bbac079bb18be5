"""Pictures that several claims share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Point = tuple[float, float]


def save(figure: Figure, path: Path) -> None:
    """As a PNG of modest size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    """A row of plots."""
    figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def dots(ax: Axes, points: Mapping[str, Sequence[Point]], xlabel: str, ylabel: str) -> None:
    """A dot a run, a colour a model."""
    for name, pairs in points.items():
        ax.scatter(*zip(*pairs, strict=True), label=name, s=22)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
