"""A picture of text in which the colour of each byte is a number, as PNG and as a page of HTML."""

import functools
import html
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from effjax.evaluation.plots import save
from effjax.evaluation.text_grid import Cell, Passage, lay_out

_CELL = (0.09, 0.18)  # width and height in inches
_FONT = FontProperties(family="DejaVu Sans Mono")  # comes with matplotlib
_FONT_SIZE = 1.5  # in cell widths; a glyph is 0.6 of its size wide
_MOST_CLASSES = 12  # whole numbers with more values than this get a continuous scale
# The light part of ColorBrewer's yellow to blue: black text stays legible on all of it, and it darkens throughout,
# so that the order of the numbers is seen in grey and by colour-blind readers too.
_LIGHT = ListedColormap(colormaps["YlGnBu"](np.linspace(0, 0.5, 256)))


class Scale:
    """Numbers to light colours: a class for each whole number if they are few, else continuous.

    Attributes:
      classes: the whole numbers from the smallest to the largest, or None.
      shown: the numbers of a legend.
    """

    def __init__(self, values: Sequence[float]):
        low, high = float(min(values)), float(max(values))
        whole = all(float(value).is_integer() for value in values)
        self.classes: list[int] | None = None
        self.shown: Sequence[float]
        if whole and high - low < _MOST_CLASSES:
            self.classes = [int(low) + i for i in range(int(high - low) + 1)]
            self.shown = self.classes
            bounds = np.arange(low - 0.5, high + 1)
            colours = _LIGHT.resampled(max(len(self.classes), 2))
            # A single class still needs two bounds; it takes the middle of the map.
            self.norm: Normalize = BoundaryNorm(bounds, max(len(self.classes), 1))
        else:
            colours = _LIGHT
            top = high if high > low else low + 1.0
            self.norm = Normalize(low, top)
            self.shown = np.linspace(low, top, 7).tolist()
        self.colours: Colormap = colours

    def __call__(self, value: float) -> tuple[float, float, float]:
        """The colour, RGB in 0..1."""
        return self.colours(self.norm(value))[:3]


def text_heatmap(
    passages: Sequence[Passage],
    path: str | Path,
    *,
    title: str,
    label: str,
    columns: int = 96,
    max_rows: int = 32,
) -> list[Path]:
    """Writes `path` (PNG) and the same picture as HTML beside it.

    Args:
      passages: text and numbers.
      path: where the PNG goes; the page gets the suffix `.html`.
      title: what the picture shows.
      label: what the numbers are, with their unit.
      columns: bytes in a row.
      max_rows: rows; the rest is left out.

    Returns:
      The two paths.

    Raises:
      ValueError: if the passages hold no text.
    """
    cells = lay_out(passages, columns, max_rows)
    if not cells:
        raise ValueError("passages hold no text; valid: at least one byte")
    scale = Scale([cell.value for cell in cells])
    path = Path(path)
    page = path.with_suffix(".html")
    save(figure(cells, scale, title, label), path)
    page.write_text(page_of(cells, scale, title, label), "utf-8")
    return [path, page]


def figure(cells: Sequence[Cell], scale: Scale, title: str, label: str) -> Figure:
    """The picture as a matplotlib figure."""
    width, height = _CELL
    columns = max(72, *(cell.column + 1 for cell in cells))
    rows = cells[-1].row + 1
    text_size = (columns * width, rows * height)
    margin, top = 0.3, 1.0  # inches
    size = (text_size[0] + 2 * margin, text_size[1] + top + margin)
    picture = Figure(figsize=size, facecolor="white")
    axes = picture.add_axes(
        (margin / size[0], margin / size[1], text_size[0] / size[0], text_size[1] / size[1])
    )
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    backgrounds = [scale(cell.value) for cell in cells]
    axes.add_collection(PolyCollection([_box(cell) for cell in cells], facecolors=backgrounds))
    outlines = [_outline(cell) for cell in cells if cell.text != " "]
    axes.add_collection(PathCollection(outlines, facecolors="black", edgecolors="none"))
    picture.text(margin / size[0], 1 - 0.28 / size[1], title, fontsize=11, weight="bold")
    bar = picture.add_axes((margin / size[0], 1 - 0.6 / size[1], 2.6 / size[0], 0.14 / size[1]))
    colours = picture.colorbar(
        ScalarMappable(scale.norm, scale.colours),
        cax=bar,
        orientation="horizontal",
        ticks=scale.classes,
    )
    colours.ax.tick_params(which="both", labelsize=8, length=0)
    beside = (margin + 2.75) / size[0]
    picture.text(beside, 1 - 0.53 / size[1], label, fontsize=9, verticalalignment="center")
    return picture


def page_of(cells: Sequence[Cell], scale: Scale, title: str, label: str) -> str:
    """The picture as a page of HTML that needs nothing else; pointing at a byte shows its number."""
    lines = []
    row = 0
    for (at, value), run in itertools.groupby(cells, lambda cell: (cell.row, cell.value)):
        lines.append("\n" * (at - row))
        row = at
        text = html.escape("".join(_html_text(cell.text) for cell in run))
        lines.append(f'<b style="{_style(scale, value)}" title="{value:g}">{text}</b>')
    legend = " ".join(f'<b style="{_style(scale, v)}">&nbsp;{v:.3g}&nbsp;</b>' for v in scale.shown)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; background: white; color: #222 }}
pre {{ font: 14px/1.45 monospace }}
b {{ font-weight: normal; color: black }}
</style></head><body>
<h1 style="font-size: 1.2em">{html.escape(title)}</h1>
<p>{legend} {html.escape(label)}</p>
<pre>{"".join(lines)}</pre>
</body></html>
"""


def _html_text(text: str) -> str:
    return text if len(text) == 1 else f"\\x{text}"


def _style(scale: Scale, value: float) -> str:
    return f"background:{to_hex(scale(value))}"


def _box(cell: Cell) -> list[tuple[float, float]]:
    x, y = cell.column, cell.row
    return [(x, y), (x + 1, y), (x + 1, y + 0.96), (x, y + 0.96)]


def _outline(cell: Cell) -> Outline:
    """The glyphs of a cell in grid units; two digits share the cell."""
    return Affine2D().translate(cell.column, cell.row).transform_path(_glyph(cell.text))


@functools.cache
def _glyph(text: str) -> Outline:
    """Outlines in a cell at the origin, y down."""
    size = _FONT_SIZE if len(text) == 1 else _FONT_SIZE * 0.5
    outline = TextPath((0, 0), text, size=size, prop=_FONT)
    advance = 0.602 * size * len(text)
    aspect = _CELL[0] / _CELL[1]
    placed = Affine2D().translate((1 - advance) / 2, 0).scale(1, -aspect).translate(0, 0.72)
    return placed.transform_path(outline)
