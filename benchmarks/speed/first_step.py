"""Time from the command to the first step, with nothing compiled before and with all that the same command compiled.

The command is a user's, `train.py --config=configs/mor.py`, in a process whose output says when it has come how far; it
is ended after its first step.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = "mor"
# What is printed when a phase has ended, in their order.
PHASES = {
    "parameters initialised": r"starting in",
    "step compiled": r"compiled the training step",
    "first step done": r"step +1/",
}


def measure(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds since the command at the end of each phase, "cold" and "warm" in each round."""
    found = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="effjax-first-step-") as folder:
        _start(
            Path(folder) / "bytecode", Path(folder), 0
        )  # writes the byte code, as any first start
        for number in range(1, rounds + 1):
            for state in found:
                found[state].append(_start(Path(folder) / "bytecode", Path(folder), number))
    return found


def _start(bytecode: Path, folder: Path, number: int) -> dict[str, float]:
    """Runs the command with the compilation cache of that number up to its first step."""
    environment = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": str(bytecode),
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(folder / f"cache-{number}"),
    }
    for name in ("PYTHONDONTWRITEBYTECODE", "JAX_COMPILATION_CACHE_DIR", "GLIBC_TUNABLES"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        command = [sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/{RECIPE}.py"]
        command += [f"--workdir={workdir}", "--config.training.log_every=1"]
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            return _times(process, start)
        finally:
            process.kill()
            process.wait()


def _times(process: subprocess.Popen, start: float) -> dict[str, float]:
    times: dict[str, float] = {}
    waiting = list(PHASES.items())
    for line in process.stdout:
        name, pattern = waiting[0]
        if re.search(pattern, line):
            times[name] = time.perf_counter() - start
            del waiting[0]
            if not waiting:
                return times
    raise RuntimeError(f"the run ended before: {waiting[0][0]}; exit code {process.wait()}")
