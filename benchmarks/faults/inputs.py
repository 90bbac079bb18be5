"""Sources that are slow or fail, steps without a finite loss, and meshes that change."""

from pathlib import Path

import numpy as np

from benchmarks.faults.bench import Bench
from benchmarks.faults.faulty import NAN_EVERY
from benchmarks.faults.outcome import Outcome
from benchmarks.faults.runs import arrays, checkpoints, curve, last_step, same_end

_SKIP = "--config.training.nonfinite=skip"
_MESHES = (8, 4, 2)


def bad_sources(bench: Bench, tries: int) -> list[Outcome]:
    """A source that waits, one that fails twice and comes back, and one that is gone for good."""
    outcomes = []
    for fault, what in (
        ("slow", "a source that stops for half a second, again and again"),
        ("flaky", "a source that loses its connection, again and again"),
    ):
        outcome = Outcome(what, "while documents are read")
        for _ in range(tries):
            workdir = bench.workdir()
            with bench.start(workdir, fault=fault) as start:
                start.finish()
                retried = "cannot be read (ConnectionResetError" in start.said()
            outcome.add(same_end(workdir, bench.undisturbed()) and retried == (fault == "flaky"))
        outcomes.append(outcome)
    gone = Outcome("a source that is gone", "while documents are read")
    for _ in range(tries):
        workdir = bench.workdir()
        with bench.start(workdir, fault="gone") as start:
            (code,) = start.exit_codes()
            told = start.said()
        good = code == 2 and "error: data: item " in told and "in 4 tries" in told
        gone.add(bench.is_unharmed(workdir) and good)
    gone.notes.append("after 3 retries one error, exit code 2; started again when it is back")
    return [*outcomes, gone]


def not_finite(bench: Bench, tries: int) -> list[Outcome]:
    """Batches whose loss is not finite: stop at them, skip them, and stop at one and then skip.

    It is the text that decides which batches these are, so one try is as good as many.
    """
    del tries
    stop = Outcome(
        "a loss that is not a number",
        f"one batch in about {NAN_EVERY}; `training.nonfinite=stop`",
        "exit code 2, the message names step and checkpoint, if there is one, and all arrays are finite",
    )
    stopped = bench.workdir()
    with bench.start(stopped, fault="nan") as start:
        (code,) = start.exit_codes()
        told = start.said()
    found = checkpoints(stopped)
    newest = f"checkpoints/{found[-1]};" if found else "no checkpoint was written yet"
    stop.add(code == 2 and "loss=nan" in told and newest in told and _is_finite(stopped))
    skip = Outcome(
        "a loss that is not a number",
        "the same; `training.nonfinite=skip`",
        "the run ends, skipped steps are counted in the log, and every array is finite",
    )
    skipping = bench.workdir()
    bench.finish(skipping, _SKIP, fault="nan")
    count = sum(line["skipped"] for line in curve(skipping))
    skip.add(count > 0 and _is_finite(skipping))
    skip.notes.append(f"{count:g} steps skipped")
    resume = Outcome(
        "a loss that is not a number",
        "stopped at it, then started again with `training.nonfinite=skip`",
        "the loss of every step within 1e-5 of that of the run that skipped from its start",
    )
    bench.finish(stopped, _SKIP, fault="nan")
    apart = _apart(stopped, skipping)
    resume.notes.append(f"{apart:.1e} apart at most")
    resume.add(apart < 1e-5)
    return [stop, skip, resume]


def _is_finite(workdir: Path) -> bool:
    return all(
        np.isfinite(array).all()
        for step in checkpoints(workdir)
        for array in arrays(workdir, step).values()
    )


def other_meshes(bench: Bench, tries: int) -> list[Outcome]:
    """Runs on 8 devices that go on on 4 and end on 2."""
    outcome = Outcome(
        "another mesh at each start",
        "8 devices at first, then 4, then 2, changed at random steps",
        "the loss of every step within 1e-5 of that of an undisturbed run on 8",
    )
    for _ in range(tries):
        _change_meshes(bench, outcome)
    return [outcome]


def _change_meshes(bench: Bench, outcome: Outcome) -> None:
    options = {"devices": max(_MESHES)}
    undisturbed = bench.undisturbed(**options)
    workdir, reached = bench.workdir(), []
    for devices in _MESHES[:-1]:
        with bench.start(workdir, f"--config.mesh.data={devices}", **options) as start:
            goal = last_step(workdir) + int(bench.rng.integers(10, 30))
            start.wait_until(lambda goal=goal: last_step(workdir) >= goal)
            start.processes[0].terminate()
            start.exit_codes()
        reached.append(checkpoints(workdir)[-1])
    bench.finish(workdir, f"--config.mesh.data={_MESHES[-1]}", **options)
    apart = _apart(workdir, undisturbed)
    outcome.notes.append(
        f"4 devices from step {reached[0]}, 2 from {reached[1]}: {apart:.1e} apart"
    )
    outcome.add(apart < 1e-5)


def _apart(workdir: Path, other: Path) -> float:
    """How far the losses of two runs are apart at most, as a share; infinite if they have other steps."""
    losses = [
        {line["step"]: line["loss"] for line in curve(folder) if "loss" in line}
        for folder in (workdir, other)
    ]
    if losses[0].keys() != losses[1].keys():
        return float("inf")
    return max(abs(losses[0][step] / losses[1][step] - 1) for step in losses[1])
