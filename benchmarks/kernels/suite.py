"""Runs the cases of some ops: times on this device, and static figures for TPUs that are not here."""

import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from benchmarks.kernels.case import Case, Contender, num_bytes
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.roofline import CHIPS, roofline
from benchmarks.kernels.schedules import schedules
from benchmarks.kernels.timing import measure
from pallas_kernels.dispatch import target

logger = logging.getLogger(__name__)

PLATFORMS = ("cpu", "gpu", "tpu")


def run(
    ops: Sequence[str], chips: Sequence[str], quick: bool, *, times: bool = True
) -> dict[str, Any]:
    """Measures every case x contender x pass.

    Args:
        ops: keys of `CASES`.
        chips: keys of `CHIPS`; none: no static figures.
        quick: the smallest shape of each op only.
        times: also time what runs on this device.

    Returns:
        What JSON can hold: of the device, and a row for each measurement. A row has "time" and, for each chip,
        "static"; what is not a figure there is {"not_run": why} or {"error": what went wrong}.

    Raises:
        ValueError: an op or chip is unknown, or libtpu is missing where there are chips.
    """
    check_names(ops, chips)
    device = target()
    # Training on accelerators is in bfloat16; a CPU has no faster type than float32.
    dtype = jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
    rows = []
    for op in ops:
        static = {chip: schedules(op, chip, quick) for chip in chips}
        for case in CASES[op](quick):
            for contender in case.contenders:
                for measured in case.work:
                    logger.info("%s %s: %s %s", op, case.shape, contender.name, measured)
                    key = (case.shape, contender.name, measured)
                    figures = {
                        chip: _static(case, measured, chip, static[chip].get(key)) for chip in chips
                    }
                    time = {"not_run": "not asked for"}
                    if times:
                        time = _time(case, contender, measured, device.platform, dtype)
                    rows.append(_row(case, contender, measured, time, figures))
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "dtype": dtype.name,
        "not_run": [platform for platform in PLATFORMS if platform != device.platform],
        "versions": versions("jax", "libtpu"),
        "chips": list(chips),
        "rows": rows,
    }


def check_names(ops: Sequence[str], chips: Sequence[str]) -> None:
    """Raises ValueError where an op is no key of `CASES` or a chip none of `CHIPS`."""
    for name, values, valid in (("op", ops, CASES), ("chips", chips, CHIPS)):
        for value in values:
            if value not in valid:
                raise ValueError(f"{name}={value!r} is unknown; valid: {', '.join(valid)}")


def total_cycles(schedule: dict) -> int | None:
    """Of a program: of the kernels and of what XLA does around them; None where those of a kernel are not known."""
    parts = [kernel["cycles"] for kernel in schedule["kernels"]] + [schedule["xla_cycles"]]
    return None if None in parts else sum(parts)


def _row(case: Case, contender: Contender, measured: str, time: dict, static: dict) -> dict:
    return {
        "op": case.op,
        "shape": case.shape,
        "implementation": contender.name,
        "is_peer": contender.is_peer,
        "pass": measured,
        "time": time,
        "static": static,
    }


def _time(case: Case, contender: Contender, measured: str, platform: str, dtype) -> dict:
    if contender.platforms is not None and platform not in contender.platforms:
        return {"not_run": f"needs {' or '.join(contender.platforms)}"}
    try:
        timing = measure(case, contender, measured, dtype)
    # Of memory, or of what a peer cannot do: the other rows are worth having.
    except Exception as error:
        logger.exception("%s %s: %s %s", case.op, case.shape, contender.name, measured)
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"seconds": timing.seconds, "runs": timing.runs}


def _static(case: Case, measured: str, chip: str, compiled: dict | None) -> dict:
    """A schedule beside the roofline of its case."""
    if compiled is None:
        return {"not_run": "loops of XLA: no static figure"}
    if "error" in compiled:
        return compiled
    least = roofline(CHIPS[chip], case.work[measured], num_bytes(case, measured, jnp.bfloat16))
    schedule = compiled["schedule"]
    cycles = total_cycles(schedule)
    return schedule | {
        "cycles": cycles,
        "roofs": least.roofs,
        "bound": least.bound,
        "ratio": None if cycles is None else cycles / least.cycles,
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Of each package, None where it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def fastest_peer(rows: Sequence[dict], row: dict) -> float | None:
    """Seconds of the fastest peer at the op, shape and pass of a row; None where none was timed."""
    seconds = [
        other["time"]["seconds"]
        for other in rows
        if all(other[key] == row[key] for key in ("op", "shape", "pass"))
        and other["is_peer"]
        and "seconds" in other["time"]
    ]
    return min(seconds, default=None)
