"""Finds block sizes and writes them to the tables: `python -m benchmarks.kernels.tune --op=attention --chips=v5e`.

For TPUs that are not here sizes are ranked by the cycles of their schedules, on the device at hand by time. What is
measured is kept, so that a run that was interrupted goes on where it was. A table gets the sizes that are better than
those of the op's rule, forward and forward with backward together.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import app, flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.kernels.case import Case, Contender
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.costs import Device, absent, present
from benchmarks.kernels.schedules import Compiler
from benchmarks.kernels.search import search
from benchmarks.kernels.suite import check_names
from pallas_kernels.blocks import Choice, Sizes, read

# Narrower, the report would break its lines.
_WIDTH = 120

_OP = flags.DEFINE_list("op", list(CASES), "Ops to tune.")
_CHIPS = flags.DEFINE_list(
    "chips",
    [],
    "TPUs to compile for with libtpu, none needed; empty: the device at hand, by time.",
)
_QUICK = flags.DEFINE_bool("quick", False, "Only the smallest shape of each op.")
_LOG = flags.DEFINE_string(
    "log", ".cache/tune.jsonl", "What was measured; delete it to do it anew."
)


class Tuned(NamedTuple):
    """What came of a case on a device: costs of each pass by rule and with what was found."""

    device: Device
    case: Case
    choices: Mapping[str, Choice]
    sizes: Mapping[str, Sizes]
    before: Mapping[str, float]
    after: Mapping[str, float]


class Log:
    """Costs that were measured, a JSON line each: infinite those of programs that cannot be."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lines = map(json.loads, path.read_text().splitlines())
        self._costs = {line["what"]: line["cost"] for line in lines}

    def __getitem__(self, what: str) -> float | None:
        return self._costs.get(what)

    def __setitem__(self, what: str, cost: float) -> None:
        self._costs[what] = cost
        with self._path.open("a") as file:
            file.write(json.dumps({"what": what, "cost": cost}) + "\n")


def tune(
    device: Device, case: Case, contender: Contender, log: Log, console: Console
) -> Tuned | None:
    """Searches sizes for the kernels of a contender in a case; None where there are none to choose."""
    title = f"{device.name} {case.op} {case.shape} {contender.name}"
    choices = device.choices(case, contender)
    if not choices:
        console.print(f"{title}: no sizes to choose", markup=False, highlight=False)
        return None
    versions = [importlib.metadata.version("jax"), device.target.device_kind, _sources(choices)]

    def costs(sizes: Mapping[str, Sizes]) -> dict[str, float]:
        found = {}
        for measured in case.work:
            what = json.dumps([*versions, title, measured, sizes])
            if log[what] is None:
                log[what] = _cost(device, case, contender, measured, sizes, console)
            found[measured] = log[what]
        return found

    def total(sizes: Mapping[str, Sizes]) -> float:
        found = costs(sizes)
        cost = sum(max(x, device.least(case, measured)) for measured, x in found.items())
        words = "; ".join(map(_words, sizes.values()))
        console.print(f"{title}: {words}: {cost:,.6g} {device.unit}", markup=False, highlight=False)
        return cost

    by_rule = {name: choice.by_rule for name, choice in choices.items()}
    sizes = search(choices, total).sizes
    return Tuned(device, case, choices, sizes, costs(by_rule), costs(sizes))


def _cost(device, case, contender, measured, sizes, console) -> float:
    try:
        return device.cost(case, contender, measured, sizes)
    # That a block does not fit, the compiler says in many ways.
    except Exception as error:
        console.print(f"cannot: {error}".splitlines()[0], style="dim", markup=False)
        return math.inf


def _sources(choices: Mapping[str, Choice]) -> str:
    """Stands for the code of an op: costs measured before it changed are of no use."""
    (folder,) = {choice.table.path.parent for choice in choices.values()}
    code = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(code).hexdigest()[:16]


def save(tuned: Tuned) -> None:
    """Writes the sizes that are not those of the rule to their tables, and removes entries that they replace."""
    for name, choice in tuned.choices.items():
        table, kind = choice.table, choice.device_kind
        entries = json.loads(table.path.read_text()) if table.path.exists() else {}
        of_kind = [x for x in entries.get(kind, []) if x["shape"] != choice.shape]
        if tuned.sizes[name] != choice.by_rule:
            of_kind.append({"shape": choice.shape, "sizes": tuned.sizes[name]})
        entries = {k: x for k, x in sorted((entries | {kind: of_kind}).items()) if x}
        if entries:
            table.path.write_text(_as_text(entries))
            read(table)
        else:
            table.path.unlink(missing_ok=True)


def _as_text(entries: Mapping[str, Sequence[dict]]) -> str:
    """JSON with an entry a line."""
    kinds = []
    for kind, of_kind in entries.items():
        lines = ",\n".join(f"    {line}" for line in sorted(map(json.dumps, of_kind)))
        kinds.append(f"  {json.dumps(kind)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def report(results: Sequence[Tuned]) -> Table:
    """Costs before and after, each beside its roofline where that is known."""
    printed = Table(
        title="Block sizes by rule (before) and found (after)",
        caption="/ least: over the roofline; below 1 memory holds it, which a schedule does not see",
        title_justify="left",
        caption_justify="left",
    )
    printed.add_column("device, pass")
    for heading in ("before", "after", "after / before", "before / least", "after / least"):
        printed.add_column(heading, justify="right")
    for tuned in results:
        printed.add_section()
        printed.add_row(f"[bold]{escape(f'{tuned.case.op} {tuned.case.shape}')}")
        for name, choice in tuned.choices.items():
            printed.add_row(f"[dim]{_words(choice.by_rule)} -> {_words(tuned.sizes[name])}")
        for measured, before in tuned.before.items():
            after, least = tuned.after[measured], tuned.device.least(tuned.case, measured)
            ratios = [f"{x / least:.2f}" if least else "?" for x in (before, after)]
            costs = [f"{x:,.5g}" if x < 1 else f"{x:,.0f}" for x in (before, after)]
            label = f"{tuned.device.name}, {measured}"
            printed.add_row(label, *costs, f"{after / before:.3f}", *ratios)
    return printed


def _words(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    log, results, console = Log(Path(_LOG.value)), [], Console()
    console = console if console.width >= _WIDTH else Console(width=_WIDTH)
    with contextlib.ExitStack() as resources:
        try:
            check_names(_OP.value, _CHIPS.value)
            compiler = resources.enter_context(Compiler()) if _CHIPS.value else None
        except ValueError as error:
            raise app.UsageError(str(error)) from error
        if _CHIPS.value:
            # Nothing runs here, and to look for a TPU takes half a minute.
            jax.config.update("jax_platforms", "cpu")
        devices = [absent(chip, compiler) for chip in _CHIPS.value] or [present()]
        cases = [case for op in _OP.value for case in CASES[op](_QUICK.value)]
        for case, device in itertools.product(cases, devices):
            for contender in device.kernels(case):
                tuned = tune(device, case, contender, log, console)
                if tuned is not None:
                    save(tuned)
                    results.append(tuned)
    console.print(report(results))


if __name__ == "__main__":
    app.run(main)
