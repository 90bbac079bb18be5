"""The loss curve of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVE_FILE = "loss.png"

# Okabe and Ito's palette: told apart by colour-blind readers.
_TRAIN, _HELDOUT, _BASELINE = "#0072B2", "#D55E00", "#666666"


def draw(
    workdir: str | Path,
    lines: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, float] | None = None,
) -> Path | None:
    """Draws training and held-out bits per byte over the steps, or the loss for a model that predicts no bytes.

    Args:
      workdir: where `loss.png` goes.
      lines: of the metrics log.
      baselines: levels to compare with, by name, drawn as horizontal lines.

    Returns:
      The path of the picture, or None if there is nothing to draw yet.
    """
    unit = "bits_per_byte" if any("bits_per_byte" in line for line in lines) else "loss"
    curves = [
        (name, color, _points(lines, key))
        for name, color, key in (
            ("train", _TRAIN, unit),
            ("held out", _HELDOUT, f"heldout/{unit}"),
        )
    ]
    curves = [(name, color, points) for name, color, points in curves if points]
    if not curves:
        return None
    from matplotlib.figure import Figure  # slow to import; without pyplot there is no global state

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, color, points in curves:
        marker = "o" if name == "held out" or len(points) == 1 else None
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, values, color=color, label=name, linewidth=1.5, marker=marker, markersize=4
        )
    for name, level in (baselines or {}).items():
        axes.axhline(level, color=_BASELINE, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {level:.2f}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            horizontalalignment="right",
            color=_BASELINE,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if unit == "bits_per_byte" else "loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(workdir) / CURVE_FILE
    figure.savefig(path, dpi=150)
    return path


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]
