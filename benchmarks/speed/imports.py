"""How long imports take, each in a process of its own, in turns with `import jax`, without which there is nothing."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

PROGRAMS = {
    "jax": "import jax",
    "effjax": "import effjax",
    "effjax.models": "import effjax.models",
    "effjax.training": "import effjax.training",
    "effjax.training.fit": "from effjax.training import fit",
    "effjax.serving": "import effjax.serving",
}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a Python that does that and ends, by the clock and of processors, by program and round.

    The byte code is there, as after any first start; a round that writes it does not count.
    """
    found = {name: {"wall": [], "cpu": []} for name in PROGRAMS}
    with tempfile.TemporaryDirectory(prefix="effjax-bytecode-") as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for number in range(rounds + 1):
            for name, program in PROGRAMS.items():
                seconds = _seconds(program, environment)
                if number:
                    for kind, values in found[name].items():
                        values.append(seconds[kind])
    return found


def _seconds(program: str, environment: Mapping[str, str]) -> dict[str, float]:
    start, before = time.perf_counter(), _cpu_seconds()
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    return {"wall": time.perf_counter() - start, "cpu": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
