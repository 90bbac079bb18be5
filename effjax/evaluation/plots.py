"""Charts of evaluation results. Each function returns a figure whose title says what is to be seen.

Colours are from viridis, which stays legible in grey and for colour-blind readers. Figures are made
without pyplot, so drawing in a training loop or a thread leaves no global state behind.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_SIZE = (6.4, 4.0)
_DPI = 150


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as PNG; whoever looks at the path sees the old picture or the new one whole."""
    path = Path(path)
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, format="png", dpi=_DPI)
    os.replace(unfinished, path)
    return path


def loss_by_position(
    table: Mapping[str, np.ndarray], baselines: Mapping[str, float] | None = None
) -> Figure:
    """Held-out loss, and bits per byte if known, against the position in context.

    Args:
      table: what `HeldOut.by_position` returns.
      baselines: bits per byte of other models, drawn as lines.
    """
    has_bytes = bool(np.isfinite(table["bits_per_byte"]).any())
    figure = Figure(figsize=(_SIZE[0] * (1.6 if has_bytes else 1), _SIZE[1]), layout="constrained")
    panels = figure.subplots(1, 1 + has_bytes, squeeze=False)[0]
    series = [("loss", "loss (nats per token)")]
    if has_bytes:
        series.append(("bits_per_byte", "bits per byte"))
    for axes, (name, label) in zip(panels, series, strict=True):
        edges = np.append(table["start"], table["stop"][-1]) + 1
        axes.stairs(table[name], edges, baseline=None, color=_colour(0.3), linewidth=1.8)
        axes.set_xscale("log", base=2)
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        _label(axes, "tokens of context", label)
    lines = ("--", ":", "-.")
    for i, (name, bits) in enumerate((baselines or {}).items() if has_bytes else ()):
        panels[-1].axhline(bits, color="0.35", linestyle=lines[i % len(lines)], label=name)
    if baselines and has_bytes:
        panels[-1].legend(frameon=False, fontsize=9)
    first, last = (f"{table['loss'][i]:.2f} {_tokens(table, i)}" for i in (0, -1))
    figure.suptitle(f"Held-out loss in nats per token: {first}, {last} of context", fontsize=11)
    return figure


def _tokens(table: Mapping[str, np.ndarray], i: int) -> str:
    """The context of bin `i` in words."""
    fewest, most = table["start"][i] + 1, table["stop"][i]
    return f"with {fewest}" if fewest == most else f"with {fewest} to {most} tokens"


def histogram(counts: Mapping[float, int], label: str, what: str) -> Figure:
    """How many tokens have each value of a per-token number.

    Args:
      counts: value to number of tokens.
      label: of the horizontal axis, with its unit.
      what: what is counted, for the title.
    """
    values = np.array(sorted(counts), float)
    shares = np.array([counts[v] for v in sorted(counts)], float)
    shares /= shares.sum()
    figure, axes = _chart(f"{what}: {values @ shares:.2f} on average")
    width = 0.8 * min(np.diff(values), default=1.0)
    scaled = (values - values[0]) / max(values[-1] - values[0], 1)
    bars = axes.bar(values, shares, width, color=colormaps["viridis"](scaled))
    if len(values) <= 12:
        axes.bar_label(bars, [f"{100 * share:.1f}%" for share in shares], fontsize=9, padding=2)
        axes.set_xticks(values)
    elif np.array_equal(values, values.round()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(y=0.12)
    _label(axes, label, "share of tokens")
    return figure


def recall_by_dimension(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Recall@k of full search against the number of dimensions.

    Args:
      rows: what `retrieval.recall_at_k` returns; rows of other methods are left out.
    """
    rows = [row for row in rows if row["method"] == "full"]
    ks = sorted({row["k"] for row in rows})
    top = max(row["dims"][-1] for row in rows)
    at = {(row["dims"][-1], row["k"]): row["recall"] for row in rows}
    small = min(dim for dim, _ in at)
    figure, axes = _chart(
        f"Recall@{ks[0]}: {at[top, ks[0]]:.3f} with {top} dimensions, "
        f"{at[small, ks[0]]:.3f} with {small}"
    )
    for i, k in enumerate(ks):
        dims = sorted(dim for dim, other in at if other == k)
        colour = _colour(0.8 * i / max(len(ks) - 1, 1))
        axes.plot(dims, [at[d, k] for d in dims], "osD^v"[i % 5] + "-", color=colour, label=f"@{k}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_ylim(0, 1.02)
    axes.legend(title="recall", frameon=False, fontsize=9)
    _label(axes, "dimensions of the embedding", "recall (fraction of queries)")
    return figure


def adaptive_retrieval(rows: Sequence[Mapping[str, Any]], k: int) -> Figure:
    """Recall@k against multiply-adds a query, for full search, shortlist and rerank, and funnels.

    Args:
      rows: what `retrieval.adaptive_curve` returns.
      k: which cut-off to draw.
    """
    rows = [row for row in rows if row["k"] == k]
    full = max((row for row in rows if row["method"] == "full"), key=lambda row: row["dims"][-1])
    good = [row for row in rows if row["recall"] >= 0.99 * full["recall"]]
    cheapest = min(good, key=lambda row: row["multiply_adds"])
    saved = full["multiply_adds"] / cheapest["multiply_adds"]
    figure, axes = _chart(
        f"99% of the recall@{k} of full search for 1/{saved:.1f} of its multiply-adds"
        if saved > 1.05
        else f"Nothing cheaper than full search has 99% of its recall@{k}"
    )
    styles = {"full": ("o", 0.05), "adaptive": ("s", 0.5), "funnel": ("^", 0.8)}
    for method, (marker, colour) in styles.items():
        chosen = sorted(
            (row["multiply_adds"], row["recall"]) for row in rows if row["method"] == method
        )
        if chosen:
            line = "-" if method == "full" else "none"
            cost, recall = zip(*chosen, strict=True)
            axes.plot(cost, recall, marker, linestyle=line, color=_colour(colour), label=method)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=9)
    _label(axes, "multiply-adds per query", f"recall@{k} (fraction of queries)")
    return figure


def recall_by_distance(table: Mapping[str, np.ndarray], accuracy: float) -> Figure:
    """Accuracy of associative recall against the distance from a query back to its pair.

    Args:
      table: `start`, `stop` (tokens, stop exclusive) and `accuracy`, each [bins].
      accuracy: over all queries.
    """
    figure, axes = _chart(f"Associative recall: {100 * accuracy:.1f}% of the values right")
    centres = np.sqrt(table["start"] * (table["stop"] - 1.0))
    axes.plot(centres, table["accuracy"], "o-", color=_colour(0.3))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.02, 1.02)
    _label(axes, "distance from query to pair (tokens)", "values right")
    return figure


def _chart(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    return figure, axes


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(at: float) -> tuple[float, ...]:
    return colormaps["viridis"](at)
