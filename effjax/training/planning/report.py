"""A plan for people: tables for a console, a picture, and JSON for programs."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from effjax.evaluation import plots
from effjax.evaluation.report import plain, readable
from effjax.training.planning.result import Plan

_GIB = 2.0**30

# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#999999", "#009E73", "#CC79A7", "#E69F00")


def tables(plan: Plan) -> Group:
    """All of a plan for a console: memory, work and time, and communication."""
    parts: list[Any] = [_facts(plan)]
    if plan.work is not None and plan.work.collectives:
        parts.append(_collectives(plan))
    return Group(*parts, plan.verdict)


def write(plan: Plan, folder: str | Path, name: str) -> list[Path]:
    """Writes `<name>.json` and `<name>.png` into a folder; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_json(path, plan.to_json())
    return [path, plots.save(draw(plan), path.with_suffix(".png"))]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")
    unfinished.replace(path)


def draw(plan: Plan) -> Figure:
    """Where the memory of a chip goes, and where the time of a step."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    panels = figure.subplots(2 if plan.pace else 1, 1, squeeze=False)[:, 0]
    bytes_of = _memory_parts(plan)
    _bar(panels[0], {name: x / _GIB for name, x in bytes_of.items()}, "GiB of memory a chip")
    if plan.memory.capacity is not None:
        panels[0].axvline(plan.memory.capacity / _GIB, color="0.2", linestyle="--")
    if plan.pace:
        seconds = plan.pace.times.parts
        _bar(panels[1], {name: 1000 * x for name, x in seconds.items()}, "ms of a step")
    title = textwrap.fill(plan.verdict, 90)
    figure.suptitle(f"{plan.what}, {plan.model} on {plan.topology}\n{title}", fontsize=9)
    return figure


def ranking(plans: Sequence[Mapping[str, Any]]) -> Table:
    """Plans in JSON beside each other, the best first.

    Args:
      plans: what `ranking.search` returns.
    """
    grid = Table(box=None, pad_edge=False)
    columns = ("mesh", "accumulation", "micro-batches", "remat", "GiB", "ms", "tokens/s", "MFU")
    for column in (*columns, "bound by"):
        grid.add_column(
            column, justify="left" if column in ("mesh", "remat", "bound by") else "right"
        )
    for row in plans:
        settings, pace = row["settings"], row.get("pace")
        axes = [f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1]
        cells = [
            ", ".join(axes) or "1",
            str(settings["accumulation_steps"]),
            readable(settings["num_microbatches"]),
            str(settings["remat"]),
        ]
        cells.append(f"{row['memory']['total'] / _GIB:.1f}")
        if pace is None:
            cells += ["-", "-", "-", "does not fit"]
        else:
            cells += [
                f"{1000 * pace['seconds']:.1f}",
                f"{pace['tokens_per_second']:,.0f}",
                f"{100 * pace['utilization']:.1f} %",
                row["bound"] if row["fits"] else "does not fit",
            ]
        grid.add_row(*cells)
    return grid


def _facts(plan: Plan) -> Table:
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_column(style="dim")
    sizes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    grid.add_row(
        plan.what, plan.model, f"{plan.topology}: {plan.num_chips} chips, mesh {sizes or 1}"
    )
    for name, value in plan.settings.items():
        grid.add_row(name, readable(value), "")
    grid.add_section()
    for name, value in _memory_parts(plan).items():
        grid.add_row(name, f"{value / _GIB:.3f} GiB", "a chip")
    capacity = plan.memory.capacity
    of = f"of {capacity / _GIB:.2f} a chip" if capacity else "a chip"
    grid.add_row("memory", f"{plan.memory.total / _GIB:.3f} GiB", of)
    if plan.memory.host:
        grid.add_row("memory of the host", f"{plan.memory.host / _GIB:.3f} GiB", "a chip")
    grid.add_section()
    grid.add_row("model FLOPs", f"{plan.model_flops:.4g}", "a step, all chips, nothing repeated")
    if plan.work is not None:
        _add_work(grid, plan)
    if plan.pace is not None:
        _add_pace(grid, plan)
    grid.add_row("compiled in", f"{plan.compile_seconds:.1f} s", "here")
    return grid


def _add_work(grid: Table, plan: Plan) -> None:
    work = plan.work
    all_chips = work.matmul_flops * plan.num_chips
    grid.add_row("program FLOPs", f"{all_chips:.4g}", "a step, all chips, products of matrices")
    grid.add_row("memory traffic", f"{work.memory_bytes / 1e9:.4g} GB", "a step and chip")
    grid.add_row("received", f"{work.network_bytes / 1e9:.4g} GB", "a step and chip")
    if work.to_host_bytes or work.from_host_bytes:
        both = f"{work.to_host_bytes / 1e9:.4g} GB, {work.from_host_bytes / 1e9:.4g} GB back"
        grid.add_row("to the host's memory", both, "a step and chip")
    if work.unknown_kernels:
        grid.add_row("unknown kernels", str(work.unknown_kernels), "operations not counted")
    if work.unknown_loops:
        grid.add_row(
            "unknown loops", str(work.unknown_loops), "trips known at run time only: counted once"
        )


def _add_pace(grid: Table, plan: Plan) -> None:
    pace = plan.pace
    for name, seconds in pace.roofs.items():
        grid.add_row(f"roof of {name}", f"{1000 * seconds:.4g} ms", "a step takes no less")
    grid.add_section()
    for name, seconds in pace.times.parts.items():
        grid.add_row(name, f"{1000 * seconds:.4g} ms", "")
    how = "by the compiler's estimate" if pace.is_estimate else "at least: it estimates nothing"
    grid.add_row("step", f"{1000 * pace.seconds:.4g} ms", how)
    grid.add_row("model FLOPs utilisation", f"{100 * pace.utilization:.1f} %", "")
    grid.add_row("tokens/s", readable(round(pace.tokens_per_second)), "")
    grid.add_row("tokens a day", f"{plan.tokens_per_day:.3g}", "")
    if plan.chip_hours is not None:
        grid.add_row("chip-hours", readable(plan.chip_hours), f"{plan.training_tokens:.3g} tokens")


def _collectives(plan: Plan) -> Table:
    grid = Table(box=None, pad_edge=False)
    for column in ("collective", "mesh axes", "times", "MB received", "ms at least"):
        is_text = column in ("collective", "mesh axes")
        grid.add_column(column, justify="left" if is_text else "right")
    for row in plan.work.collectives:
        grid.add_row(
            row["kind"],
            ", ".join(row["axes"]),
            readable(row["times"]),
            f"{row['bytes'] / 1e6:,.1f}",
            f"{1000 * row['seconds']:.3f}",
        )
    return grid


def _memory_parts(plan: Plan) -> dict[str, float]:
    memory = plan.memory
    return {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "batch and other state": memory.other,
        "activations and temporaries": memory.temporaries,
    }


def _bar(axes: Any, parts: Mapping[str, float], label: str) -> None:
    left = 0.0
    for (name, value), colour in zip(parts.items(), _COLOURS, strict=False):
        axes.barh([0], [value], left=left, color=colour, label=f"{name} {value:.3g}")
        left += value
    axes.set_yticks([])
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
