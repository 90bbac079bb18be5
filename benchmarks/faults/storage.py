"""Disks that are full, and disks that lose what was written."""

import resource
import shutil
import subprocess
from pathlib import Path

from benchmarks.faults.bench import Bench
from benchmarks.faults.outcome import Outcome
from benchmarks.faults.runs import checkpoints, same_end

_ITEMS = ("params", "ema", "rest")
# A mount that no other process sees, and that ends with the shell.
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


def full_disk(bench: Bench, tries: int) -> list[Outcome]:
    """A save for which there is no room; the run is started again when there is."""
    size = _bytes(bench.undisturbed() / "checkpoints")
    limited = Outcome("disk full", "a file of a checkpoint grows past what the process may write")
    for _ in range(tries):
        _run_out_of(bench, limited, largest_file=int(bench.rng.uniform(0.01, 0.03) * size))
    outcomes = [limited]
    if _may_mount(bench):
        mounted = Outcome("disk full", "a file system with room for a few checkpoints only")
        for _ in range(tries):
            _fill(bench, mounted, room=int(bench.rng.uniform(0.5, 0.9) * size))
        outcomes.append(mounted)
    return outcomes


def _run_out_of(bench: Bench, outcome: Outcome, largest_file: int) -> None:
    workdir = bench.workdir()
    with bench.start(workdir) as start:
        start.wait_until(lambda: checkpoints(workdir))
        limit = (largest_file, largest_file)
        resource.prlimit(start.processes[0].pid, resource.RLIMIT_FSIZE, limit)
        good = _failed_clearly(start.exit_codes()[0], start.said())
    outcome.add(bench.is_unharmed(workdir) and good)


def _fill(bench: Bench, outcome: Outcome, room: int) -> None:
    """Both starts are in one namespace, where the workdir is a file system in memory."""
    workdir, copy = bench.workdir(), bench.workdir()
    workdir.mkdir()
    script = (
        f"mount -t tmpfs -o size={room} none {workdir} && "
        '"$@"; echo "ended with $?"; '
        f'mount -o remount,size=1g {workdir} && "$@"; cp -a {workdir} {copy}'
    )
    with bench.start(workdir, prefix=(*_NAMESPACE, script, "sh")) as start:
        start.exit_codes()
        first, _, rest = start.said().partition("ended with ")
        code = int(rest.split()[0])
    good = _failed_clearly(code, first)
    outcome.add(same_end(copy, bench.undisturbed()) and good)


def _failed_clearly(code: int, said: str) -> bool:
    return code == 2 and "error: " in said and "Traceback" not in said.split("error: ")[-1]


def _may_mount(bench: Bench) -> bool:
    folder = bench.workdir()
    folder.mkdir()
    command = [*_NAMESPACE, f"mount -t tmpfs -o size=1m none {folder}"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def damaged(bench: Bench, tries: int) -> list[Outcome]:
    """The newest checkpoint of a run that was killed is truncated, has lost a file or has a flipped bit."""
    damages = {"truncated": _truncate, "lost": Path.unlink, "changed by one bit": _flip}
    source = bench.workdir()
    with bench.start(source) as start:
        start.wait_until(lambda: len(checkpoints(source)) > 2)
        start.kill()
    outcomes = []
    for what, damage in damages.items():
        outcome = Outcome(f"a file of the newest checkpoint {what}", "between two starts")
        for _ in range(tries):
            workdir = bench.workdir()
            shutil.copytree(source, workdir)
            newest = workdir / "checkpoints" / str(checkpoints(workdir)[-1])
            damage(_largest_file(newest / bench.rng.choice(_ITEMS)))
            with bench.start(workdir) as start:
                start.finish()
                good = f"checkpoint {newest} cannot be read" in start.said()
                good = good and "going on with the checkpoint before" in start.said()
            outcome.add(same_end(workdir, bench.undisturbed()) and good)
            bench.console.print(f"{outcome.fault}: {outcome.survived} of {outcome.tried}")
        outcome.notes.append("the message names the damaged checkpoint and the one it goes on from")
        outcomes.append(outcome)
    return outcomes


def _largest_file(folder: Path) -> Path:
    """The one with the arrays; of the small ones, some are left over from writing, and nobody misses them."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
