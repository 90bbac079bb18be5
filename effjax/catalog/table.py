"""The catalogue as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from effjax.catalog.entry import Entry


def table(entries: Sequence[Entry]) -> Table:
    """A row an entry: the paper, and beside it what it is here, trains it, tests it, and became of its claim."""
    measured = sum(entry.result is not None for entry in entries)
    out = Table(
        title="Papers that are parts of effjax",
        caption=f"papers: {len(entries)}, headline claims measured: {measured}",
        show_lines=True,
    )
    out.add_column("paper", no_wrap=True)
    out.add_column("in the library", overflow="fold")
    for entry in entries:
        paper = Text.assemble((entry.name, "bold"), f"\n{entry.family}\n{entry.paper}")
        out.add_row(paper, Text("\n".join(_evidence(entry))))
    return out


def _evidence(entry: Entry) -> list[str]:
    lines = [
        ("symbol", entry.symbols),
        ("config", entry.configs or ("none, it is one call",)),
        ("test", entry.tests),
        ("claim", (entry.claim,)),
    ]
    return [f"{what + ':':8}{_first(names)}" for what, names in lines]


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
