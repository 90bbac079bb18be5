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
) -> None:
    """Writes the report to `path`, draws it as a PNG of that name, prints its table, and says what was written."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, out.with_suffix(".png"))
    console = Console()
    console.print(table(report))
    console.print(f"wrote {out} and {out.with_suffix('.png')}")
