"""Starts of `train.py` in processes of their own, and what they leave behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.faults import FAULT

ROOT = Path(__file__).parents[2]
# A start that takes longer hangs.
PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.004
# What a run says when all its steps are done and saved.
_TRAINED = "evaluating on held-out data"
_TIMINGS = ("tokens_per_second", "flops_per_second")


class Start:
    """One start of a run: its processes, which are killed at the end of the block if they still run.

    Attributes:
      processes: one, or those that train together.
      began: when, by the clock of files.
    """

    def __init__(
        self,
        text: Path,
        workdir: Path,
        *flags: str,
        fault: str = "none",
        num_processes: int = 1,
        devices: int = 1,
        prefix: Sequence[str] = (),
    ):
        """Starts.

        Args:
          text: folder of the text to train on.
          workdir: of the run.
          *flags: more of them for `train.py`.
          fault: what the parts of `faulty` are to do.
          num_processes: how many train together.
          devices: virtual devices of each.
          prefix: command line before that of Python.
        """
        self._logs = [
            workdir.with_name(f"{workdir.name}.{time.time_ns()}.{i}.log")
            for i in range(num_processes)
        ]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            FAULT: fault,
        }
        recipe = Path(__file__).with_name("recipe.py")
        command = [*prefix, sys.executable, str(ROOT / "train.py")]
        command += [f"--config={recipe}:{text}", f"--workdir={workdir}", *flags]
        self.began = time.time()
        self.processes = []
        self._listeners = []
        address = f"localhost:{_free_port()}"
        for i, log in enumerate(self._logs):
            together = [
                "--distributed",
                f"--distributed.coordinator_address={address}",
                f"--distributed.num_processes={num_processes}",
                f"--distributed.process_id={i}",
            ]
            process = subprocess.Popen(
                command + (together if num_processes > 1 else []),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            # Through a pipe: what hurts the files of a run must not keep us from hearing of it.
            listener = threading.Thread(
                target=_copy, args=(process.stdout, log.open("wb", buffering=0)), daemon=True
            )
            listener.start()
            self.processes.append(process)
            self._listeners.append(listener)

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
        self._wait()

    def said(self, process: int = 0) -> str:
        """What a process has written so far."""
        return self._logs[process].read_text(errors="replace")

    @property
    def trained(self) -> bool:
        """Whether all steps are done and saved."""
        return _TRAINED in self.said()

    @property
    def ended(self) -> bool:
        """Whether any of the processes has ended."""
        return any(process.poll() is not None for process in self.processes)

    def wait_until(self, condition: Callable[[], Any]) -> bool:
        """Returns when the condition holds (True) or a process has ended (False)."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.ended:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened in {PATIENCE_SECONDS:g} s: {self.said()}")
            time.sleep(_POLL_SECONDS)
        return False

    def kill(self, process: int = 0) -> None:
        """SIGKILL: the process has no chance to do anything about it."""
        self.processes[process].send_signal(signal.SIGKILL)
        self.processes[process].wait()

    def exit_codes(self) -> list[int]:
        """Waits for all processes to end by themselves."""
        return self._wait()

    def _wait(self) -> list[int]:
        codes = [process.wait(PATIENCE_SECONDS) for process in self.processes]
        for listener in self._listeners:
            listener.join()  # the last words
        return codes

    def finish(self) -> None:
        """Waits for the end of the training; the evaluation that follows is of no interest here.

        Raises:
          RuntimeError: if it was not a good one, with what was said.
        """
        if not self.wait_until(lambda: self.trained) and any(self.exit_codes()):
            told = "\n".join(self.said(i)[-2000:] for i in range(len(self.processes)))
            raise RuntimeError(f"train.py ended with {self.exit_codes()}: {told}")


def checkpoints(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints, in increasing order."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def unfinished(workdir: Path, since: float) -> list[str]:
    """Names of the checkpoints that are being written, or were when their writer died, begun after that time."""
    found = []
    folder = workdir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            if not path.name.isdecimal() and path.stat().st_ctime > since:
                found.append(path.name)
    return found


def last_step(workdir: Path) -> int:
    """The last step in the log; 0 if there is none."""
    path = workdir / "metrics.jsonl"
    *lines, _ = path.read_text().split("\n") if path.is_file() else [""]
    return json.loads(lines[-1])["step"] if lines else 0


def curve(workdir: Path) -> list[dict[str, Any]]:
    """The lines of the log without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k not in _TIMINGS} for line in found]


def arrays(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by item and path; the newest by default."""
    step = checkpoints(workdir)[-1] if step is None else step
    return dict(_arrays(workdir / "checkpoints" / str(step)))


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("params", "ema", "rest"):
        tree = ocp.StandardCheckpointHandler().metadata(path / item).tree
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
        with ocp.StandardCheckpointer() as reader:
            found = reader.restore(path / item, like)
        for where, leaf in jax.tree_util.tree_leaves_with_path(found):
            yield item + jax.tree_util.keystr(where), np.asarray(leaf)


def same_end(workdir: Path, undisturbed: Path) -> bool:
    """Whether two finished runs are the same to the bit: arrays, data state, and every line of the log."""
    one, other = (_end(folder) for folder in (workdir, undisturbed))
    return one == other and curve(workdir) == curve(undisturbed)


def _end(workdir: Path) -> Mapping[str, Any]:
    path = workdir / "checkpoints" / str(checkpoints(workdir)[-1])
    states = {file.name: file.read_text() for file in (path / "data").glob("process_*")}
    return {
        "step": path.name,
        "arrays": {k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays(workdir).items()},
        "data": states,
    }


def _copy(stream: IO[bytes], log: IO[bytes]) -> None:
    with stream, log:
        while piece := stream.read1():
            log.write(piece)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
