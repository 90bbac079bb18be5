"""Static schedules of the cases for TPUs that are not here: the compiler runs in a process of its own and dumps them.

libtpu reads its flags once, when it is loaded, so that they have to be in the environment of a process before it
imports jax; and one that dies on a kernel must not take the benchmark with it.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.kernels.cases import CASES
from pallas_kernels import topology

# How the names of the dumped files end.
BUNDLES = "final_bundles.txt"
UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"

_REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
    """What `compile_schedules` does in a process.

    Attributes:
        op: a key of `cases.CASES`.
        quick: the smallest shape only.
        chip: a kind of TPU.
        dump: folder that the compiler dumps into.
        results: file that gets the results.
    """

    op: str
    quick: bool
    chip: str
    dump: str
    results: str


def schedules(op: str, chip: str, quick: bool) -> dict[tuple[str, str, str], dict]:
    """Compiles all contenders of an op that have a schedule.

    Returns:
        {(shape, contender, pass): {"schedule": ...} or {"error": what went wrong}}.

    Raises:
        ValueError: libtpu is not installed.
    """
    if not topology.is_available():
        raise ValueError(f"schedules for {chip!r} need libtpu: pip install libtpu")
    with tempfile.TemporaryDirectory() as folder:
        dump, results = Path(folder) / "dump", Path(folder) / "results.jsonl"
        dump.mkdir()
        results.touch()
        job = Job(op, quick, chip, str(dump), str(results))
        command = [sys.executable, "-m", "benchmarks.kernels.compile_schedules"]
        process = subprocess.run(
            [*command, json.dumps(dataclasses.asdict(job))],
            env=os.environ | _environment(dump),
            cwd=_REPOSITORY,
            check=False,
            capture_output=True,
            text=True,
        )
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = {(line.pop("shape"), line.pop("name"), line.pop("measured")): line for line in lines}
    last_words = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    died = {"error": f"the compiler's process died: {last_words}"}
    return {key: found.get(key, died) for key in _keys(op, quick)}


def _keys(op: str, quick: bool) -> list[tuple[str, str, str]]:
    return [
        (case.shape, contender.name, measured)
        for case in CASES[op](quick)
        for contender in case.contenders
        if contender.has_schedule
        for measured in case.work
    ]


def _environment(dump: Path) -> dict[str, str]:
    """Variables that make libtpu dump the last stage of each program, and nothing be taken from a cache."""
    flags = {
        "xla_jf_dump_to": dump,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_emit_annotations": "true",
        # All stages of a kernel are hundreds of megabytes.
        "xla_jf_dump_llo_pass_label_regex": "final",
    }
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
    }
