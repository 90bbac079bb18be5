"""`docs/PLANS.md`, and the curve beside it: all plans that are known."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plans.cases import CONTEXT, MEMORY, UTILIZATION, Case

_GIB = 2**30
_PARTS = ("parameters", "optimizer", "other", "temporaries")
_INTRODUCTION = """\
# Plans: the shipped recipes on machines that are not here

Made by `python -m benchmarks.plans`, from what `train.py --plan.topology=...` says of each: the real training step,
compiled for those chips by their own compiler on a CPU host. Times are what the compiler estimates for what it makes,
the schedules of the Pallas kernels, and what the links need for what is exchanged, played through in the order of the
program. **None of it has been compared with a run on such chips.** Utilisation is of model FLOPs: what is recomputed
does not count. Of logits a chip holds those of 8192 words at a time.
"""
_UTILIZATION = """\
| recipe | machine | mesh | remat | rows a step | GiB a chip | ms a step | tokens/s | utilisation | aim | most goes to |
|---|---|---|---|--:|--:|--:|--:|--:|--:|---|
"""
_MEMORY = """
## Memory of a chip, with one row on each

| recipe | machine | chips | GiB a chip | of it state | jax |
|---|---|--:|--:|--:|---|
"""
_CONTEXT = """
## One row over all chips, 8192 tokens on each

Keys go around a ring of all chips, on which each has the whole state: a row is as long as there are chips for it. Every
token sees all before it, so that a row of twice the length on twice the chips takes attention twice the time.

| recipe | machine | chips | tokens of the row | GiB a chip | ms a step | of it waiting for chips |
|---|---|--:|--:|--:|--:|--:|
"""


def document(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
      plans: `Plan.to_json` and `jax`, the version, by the name of the case; others are left out.
    """
    pace = "".join(_pace(case, plans[case.name]) for case in UTILIZATION if case.name in plans)
    memory = "".join(_memory(case, plans[case.name]) for case in MEMORY if case.name in plans)
    context = "".join(_context(case, plans[case.name]) for case in CONTEXT if case.name in plans)
    memory += "\n![curve](results/plans.png)\n"
    return f"{_INTRODUCTION}\n{_UTILIZATION}{pace}{_MEMORY}{memory}{_CONTEXT}{context}"


def draw(plans: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """What a chip holds over the number of chips, part by part, of each recipe."""
    import matplotlib.pyplot as plt

    known: dict[str, list[Mapping[str, Any]]] = {}
    for case in MEMORY:
        if case.name in plans:
            known.setdefault(case.recipe, []).append(plans[case.name])
    size = (4.2 * len(known), 3.4)
    figure, panels = plt.subplots(
        1, len(known), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, (recipe, found) in zip(panels[0], known.items(), strict=True):
        axes.stackplot(
            [plan["num_chips"] for plan in found],
            *([plan["memory"][part] / _GIB for plan in found] for part in _PARTS),
            labels=_PARTS,
        )
        axes.set(xlabel=f"chips, a row on each: {recipe}", xscale="log")
        axes.set_xticks([plan["num_chips"] for plan in found])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("GiB a chip")
    panels[0, 0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pace(case: Case, plan: Mapping[str, Any]) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    pace = plan["pace"]
    cells = (
        case.recipe,
        case.topology,
        mesh,
        plan["settings"]["remat"] or "none",
        plan["settings"]["batch_size"],
        f"{plan['memory']['total'] / _GIB:.1f}",
        f"{1000 * pace['seconds']:.1f}" if pace else "does not fit",
        f"{pace['tokens_per_second']:,.0f}" if pace else "",
        f"{100 * pace['utilization']:.1f} %" if pace else "",
        f"{100 * case.target:.0f} %",
        plan["bound"] or "",
    )
    return _row(*cells)


def _memory(case: Case, plan: Mapping[str, Any]) -> str:
    memory = plan["memory"]
    state = memory["parameters"] + memory["optimizer"]
    gib = (f"{x / _GIB:.3f}" for x in (memory["total"], state))
    return _row(case.recipe, case.topology, plan["num_chips"], *gib, plan["jax"])


def _context(case: Case, plan: Mapping[str, Any]) -> str:
    pace, tokens = plan["pace"], plan["settings"]["seq_len"]
    cells = (
        case.recipe,
        case.topology,
        plan["num_chips"],
        f"{tokens:,}",
        f"{plan['memory']['total'] / _GIB:.1f}",
        f"{1000 * pace['seconds']:,.0f}",
        f"{1000 * pace['times']['network']:,.0f}",
    )
    return _row(*cells)


def _row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"
