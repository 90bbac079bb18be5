"""What a benchmark leaves behind: JSON, a picture beside it, and a table for the eye."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def publish(
    report: Mapping[str, Any],
    path: str | Path,
    draw: Callable[[Mapping[str, Any], Path], None],
    table: Callable[[Mapping[str, Any]], Table],
    picture: str | Path | None = None,
) -> None:
    """Writes the report to `path`, draws it, prints its table, and says what was written.

    Args:
        report: what JSON can hold.
        path: of the report.
        draw: makes a PNG of it at a path.
        table: makes its table.
        picture: path of the PNG; None: beside the report.
    """
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    picture = out.with_suffix(".png") if picture is None else Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(report, picture)
    console = Console()
    console.print(table(report))
    console.print(f"wrote {out} and {picture}")
