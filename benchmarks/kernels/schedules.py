"""Static schedules of the cases for TPUs that are not here: the compiler runs in a process of its own and dumps them.

libtpu reads its flags once, when it is loaded, so that they have to be in the environment of a process before it
imports jax; and one that dies on a kernel must not take the benchmark with it.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.kernels.cases import CASES
from pallas_kernels import topology
from pallas_kernels.blocks import Choice, Sizes

# How the names of the dumped files end.
BUNDLES = "final_bundles.txt"
UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"

_REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
        op: a key of `cases.CASES`.
        shape: of one of its cases.
        contender: name of one of the case's contenders.
        measured: the pass.
        chip: a kind of TPU.
        sizes: block sizes by the name of a choice, those not there by rule; None: what tables and rules say.
    """

    op: str
    shape: str
    contender: str
    measured: str
    chip: str
    sizes: Mapping[str, Sizes] | None = None

    def decide(self, choice: Choice) -> Sizes | None:
        """What `pallas_kernels.blocks.decided_by` takes."""
        return None if self.sizes is None else self.sizes.get(choice.name, choice.by_rule)


class Compiler(contextlib.AbstractContextManager):
    """A process that compiles one program after the other. It is started when it is needed, and again if it dies.

    Raises:
        ValueError: libtpu is not installed.
    """

    def __init__(self):
        if not topology.is_available():
            raise ValueError("static schedules need libtpu: pip install libtpu")
        self._folder = tempfile.TemporaryDirectory()
        self._dump, self._words = (Path(self._folder.name) / name for name in ("dump", "words"))
        self._dump.mkdir()
        self._process: subprocess.Popen | None = None

    def compile(self, job: Job) -> dict:
        """Returns {"schedule": ...} or {"error": what went wrong}."""
        if self._process is None:
            self._process = self._start()
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code, self._process = self._process.wait(), None
        last_words = (self._words.read_text().strip().splitlines() or [f"exit code {code}"])[-1]
        return {"error": f"the compiler's process died: {last_words}"}

    def __exit__(self, *exception):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
        self._folder.cleanup()

    def _start(self) -> subprocess.Popen:
        with self._words.open("w") as words:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.kernels.compile_schedules", str(self._dump)],
                env=os.environ | environment(self._dump),
                cwd=_REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
            )


def schedules(op: str, chip: str, quick: bool) -> dict[tuple[str, str, str], dict]:
    """Compiles all contenders of an op that have a schedule.

    Returns:
        {(shape, contender, pass): {"schedule": ...} or {"error": what went wrong}}.

    Raises:
        ValueError: libtpu is not installed.
    """
    with Compiler() as compiler:
        return {
            (case.shape, contender.name, measured): compiler.compile(
                Job(op, case.shape, contender.name, measured, chip)
            )
            for case in CASES[op](quick)
            for contender in case.contenders
            if contender.has_schedule
            for measured in case.work
        }


def environment(dump: Path) -> dict[str, str]:
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
