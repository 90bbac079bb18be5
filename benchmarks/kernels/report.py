"""The measurements as tables for people."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.kernels.case import BOTH, FORWARD
from benchmarks.kernels.suite import fastest_peer

_PASSES = (FORWARD, BOTH)


def tables(report: dict[str, Any]) -> Group:
    """Times here, if any, then the static figures of each chip, then what was not run.

    Args:
        report: what `suite.run` returns.
    """
    not_run = ", ".join(report["not_run"])
    is_timed = any("seconds" in row["time"] for row in report["rows"])
    return Group(
        *([_times(report)] if is_timed else []),
        *(_static(report["rows"], chip) for chip in report["chips"]),
        Text(f"Not run: anything on {not_run}. Static figures are of no run, but of the compiler."),
    )


def _times(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"Median milliseconds on {report['device_kind']}, {report['dtype']}",
        caption="x peer: the time over that of the fastest peer; below 1 is faster",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("implementation")
    for measured in _PASSES:
        table.add_column(measured, justify="right")
        table.add_column("x peer", justify="right")
    for title, rows in _cases(report["rows"]):
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for name, of_name in groupby(rows, key=lambda row: row["implementation"]):
            by_pass = {row["pass"]: row for row in of_name}
            cells = [_time_cells(report["rows"], by_pass.get(measured)) for measured in _PASSES]
            is_peer = next(iter(by_pass.values()))["is_peer"]
            table.add_row(_name(name, is_peer), *(cell for pair in cells for cell in pair))
    return table


def _time_cells(rows: Sequence[dict], row: dict | None) -> tuple[str, str]:
    if row is None:
        return "-", ""
    time = row["time"]
    if "seconds" not in time:
        return f"not run: {time['not_run']}" if "not_run" in time else "failed", ""
    peer = fastest_peer(rows, row)
    relative = "" if peer is None else f"{time['seconds'] / peer:.2f}"
    return f"{time['seconds'] * 1e3:.2f}", relative


def _static(rows: Sequence[dict], chip: str) -> Table:
    table = Table(
        title=f"Static schedule for {chip}, bfloat16",
        caption="A step's bundles x steps = cycles where nothing stalls; 'all' adds what XLA does around the kernels.\n"
        ">=: loops of unknown length are counted once. Roofs: the least cycles of the unit that has\n"
        "the most to do, and of the memory, which a schedule does not see; ratio: the cycles over the higher of them.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("implementation, kernel", max_width=36)
    for heading in (
        "bundles",
        "steps",
        "cycles",
        "matmul",
        "VMEM MiB",
        "compute",
        "memory",
        "ratio",
    ):
        table.add_column(heading, justify="right")
    for title, of_case in _cases(rows):
        compiled = [row for row in of_case if "not_run" not in row["static"][chip]]
        if not compiled:
            continue
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for row in compiled:
            for cells in _static_lines(row, row["static"][chip]):
                table.add_row(*cells)
    return table


def _static_lines(row: dict, static: dict) -> Iterator[tuple]:
    name = _name(f"{row['implementation']}, {row['pass']}", row["is_peer"])
    if "error" in static:
        yield name, Text(f"cannot: {static['error']}", style="dim", overflow="fold")
        return
    roofs = dict(static["roofs"])
    memory = _count(roofs.pop("memory"))
    unit = max(roofs, key=roofs.get)
    compute = f"{_count(roofs[unit])} {unit}"
    ratio = "?" if static["ratio"] is None else f"{static['ratio']:.2f}"
    at_least = ">= " if static["unknown_loops"] else ""
    yield name, "", "all", at_least + _count(static["cycles"]), "", "", compute, memory, ratio
    for kernel in static["kernels"]:
        yield (
            Text(f"  {kernel['name']}", style="dim", overflow="ellipsis", no_wrap=True),
            _count(kernel["step_bundles"]),
            _count(kernel["steps"]),
            _count(kernel["cycles"]),
            f"{kernel['matmul_utilization']:.0%}",
            "?" if kernel["vmem_bytes"] is None else f"{kernel['vmem_bytes'] / 2**20:.1f}",
        )


def _cases(rows: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    for (op, shape), of_case in groupby(rows, key=lambda row: (row["op"], row["shape"])):
        yield f"{op} {shape}", list(of_case)


def _name(name: str, is_peer: bool) -> Text:
    return Text(name, style="" if is_peer else "green")


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"
