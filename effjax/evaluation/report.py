"""The results of an evaluation as files: JSON for programs, a table for people."""

import dataclasses
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

JSON_FILE = "report.json"
TABLE_FILE = "report.txt"


def write(report: Mapping[str, Any], workdir: str | Path) -> str:
    """Writes `report.json` and `report.txt` into a folder; returns the text of the latter.

    Each file is the old one or the new one whole, never half of it.
    """
    report = plain(report)
    text = table(report)
    workdir = Path(workdir)
    _replace(workdir / JSON_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    _replace(workdir / TABLE_FILE, text)
    return text


def plain(value: Any) -> Any:
    """Dataclasses, arrays and NumPy scalars as JSON has them; a number that is not finite is None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(report: Mapping[str, Any], width: int = 88) -> str:
    """The numbers of a report, a line each; lists (curves) are left to the plots.

    Args:
      report: as `plain` gives it.
      width: characters in a line.
    """
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(overflow="fold")
    grid.add_column(justify="right", overflow="fold")
    section = None
    for path, value in _scalars(report):
        first, _, rest = path.partition(".")
        if rest and first != section:
            grid.add_row("", "")
            grid.add_row(first, "")
            section = first
        grid.add_row(f"  {rest}" if rest else path, readable(value))
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    console.print(grid, markup=False)
    lines = text.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def readable(value: Any) -> str:
    """A number to four significant digits or to a whole number, thousands set apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _scalars(report: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all that is not a list, sections after the numbers that precede them."""
    for key, value in report.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, Mapping):
            yield from _scalars(value, path)
        elif not isinstance(value, list):
            yield path, value


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(path.suffix + ".tmp")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)
