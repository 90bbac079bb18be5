"""Processes that are killed or told to stop."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import NUM_STEPS
from benchmarks.faults.bench import Bench
from benchmarks.faults.outcome import Outcome
from benchmarks.faults.runs import Start, checkpoints, last_step, unfinished

GRACE_SECONDS = 30.0
# What a process says that cannot go on without another: ours, and JAX's where its own thread is first.
_LOST = (
    "stops: a computation of all processes failed",
    "Terminating process because the JAX distributed service detected fatal errors",
)
_ANY = "at a random moment, start-up included"
_SAVE = "while a checkpoint is written"
_RESTORE = "while a checkpoint is read"
# What a run says before and after it has read a checkpoint, and about how long it takes to read and to write one.
_READING, _RESTORED = "reading checkpoint", "going on after step"
_RESTORE_SECONDS, _SAVE_SECONDS = 0.3, 0.01
_START_SECONDS, _STEP_SECONDS = 12.0, 0.05
PAIR = {"num_processes": 2}


def killed(bench: Bench, kills: int) -> list[Outcome]:
    """SIGKILL at random moments, in mid-save and in mid-restore; each run again and again until it ends."""
    outcomes = {where: Outcome("SIGKILL", where) for where in (_ANY, _SAVE, _RESTORE)}
    while sum(outcome.tried for outcome in outcomes.values()) < kills:
        workdir, hits = bench.workdir(), []
        while sum(outcome.tried for outcome in outcomes.values()) + len(hits) < kills:
            possible = [_ANY, _SAVE, _RESTORE] if checkpoints(workdir) else [_ANY, _SAVE]
            aim = min(possible, key=lambda where: outcomes[where].tried + hits.count(where))
            with bench.start(workdir) as start:
                where = _wait_for(aim, bench, start, workdir)
                if where is None:
                    break
                start.kill()
            hits.append(where)
            bench.console.print(f"SIGKILL {where}, with the checkpoints {checkpoints(workdir)}")
        unharmed = bench.is_unharmed(workdir)
        bench.console.print(f"SIGKILL {len(hits)} times: {'un' * unharmed}harmed")
        for where in hits:
            outcomes[where].add(unharmed)
    return list(outcomes.values())


def _wait_for(aim: str, bench: Bench, start: Start, workdir: Path) -> str | None:
    """Waits for a moment of that kind; returns of which kind it is, or None if the run was faster."""
    if aim == _SAVE:
        for _ in range(bench.rng.integers(1, 5)):  # not always the first save of a start
            start.wait_until(lambda: not unfinished(workdir, start.began))
            start.wait_until(lambda: unfinished(workdir, start.began))
        time.sleep(bench.rng.uniform(0, _SAVE_SECONDS))
        where = _SAVE if unfinished(workdir, start.began) else _ANY
    elif aim == _RESTORE:
        start.wait_until(lambda: _READING in start.said())
        time.sleep(bench.rng.uniform(0, _RESTORE_SECONDS))
        where = _ANY if _RESTORED in start.said() else _RESTORE
    else:
        if bench.rng.random() < 0.4:
            time.sleep(bench.rng.uniform(0, _START_SECONDS))
        else:
            goal = last_step(workdir) + bench.rng.integers(1, NUM_STEPS // 4)
            start.wait_until(lambda: last_step(workdir) >= goal or start.trained)
            time.sleep(bench.rng.uniform(0, _STEP_SECONDS))
        where = _ANY
    return None if start.ended or start.trained else where


def told_to_stop(bench: Bench, tries: int) -> list[Outcome]:
    """SIGTERM to a run of one process, and to one of the two processes of a run."""
    alone = Outcome("SIGTERM", "one process, at a random step")
    together = Outcome("SIGTERM", "one of two processes that train together, at a random step")
    for outcome, options in ((alone, {}), (together, PAIR)):
        slowest = 0.0
        for _ in range(tries):
            workdir = bench.workdir()
            victim = int(bench.rng.integers(options.get("num_processes", 1)))
            with bench.start(workdir, **options) as start:
                _wait_for_step(bench, start, workdir)
                start.processes[victim].send_signal(signal.SIGTERM)
                began = time.monotonic()
                codes = start.exit_codes()
                slowest = max(slowest, time.monotonic() - began)
                good = not any(codes) and "SIGTERM: stopped after step" in start.said()
            good = good and last_step(workdir) == checkpoints(workdir)[-1] < NUM_STEPS
            outcome.add(bench.is_unharmed(workdir, **options) and good and slowest < GRACE_SECONDS)
            bench.console.print(
                f"SIGTERM to {outcome.where}: {outcome.survived} of {outcome.tried}"
            )
        outcome.notes.append(
            f"exit code 0, the checkpoint of that very step, {slowest:.1f} s at most"
        )
    return [alone, together]


def killed_among_two(bench: Bench, tries: int) -> list[Outcome]:
    """SIGKILL of one of two processes that train together: the other ends by itself; a restart goes on."""
    outcome = Outcome("SIGKILL", "one of two processes that train together, at a random step")
    slowest, messages = 0.0, 0
    for number in range(tries):
        workdir, victim = bench.workdir(), number % 2
        with bench.start(workdir, **PAIR) as start:
            _wait_for_step(bench, start, workdir)
            start.kill(victim)
            began = time.monotonic()
            code = start.processes[1 - victim].wait(GRACE_SECONDS)
            slowest = max(slowest, time.monotonic() - began)
            said = start.said(1 - victim)
            told = any(message in said for message in _LOST)
            messages += told
        good = code != 0 and told
        outcome.add(bench.is_unharmed(workdir, **PAIR) and good)
        bench.console.print(f"SIGKILL of process {victim} of 2: {outcome.survived} survived")
    outcome.notes.append(
        f"the other process ended after {slowest:.1f} s at most, with a message {messages} times of {tries}"
    )
    return [outcome]


def _wait_for_step(bench: Bench, start: Start, workdir: Path) -> None:
    step = bench.rng.integers(1, NUM_STEPS // 2)
    if not start.wait_until(_reaches(workdir, int(step))):
        raise RuntimeError(f"the run ended before step {step}: {start.said()}")


def _reaches(workdir: Path, step: int) -> Callable[[], bool]:
    return lambda: last_step(workdir) >= step
