"""A run on several processes: how they find each other, and how they end together.

Nothing here is home-made: `jax.distributed` knows the cluster (TPU pods, SLURM, Kubernetes, Open MPI) or is told
where the first process is, and from then on all processes run one program over all their devices.
"""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NoReturn

import jax

from effjax import processes

# A process that is silent for so long is held to be dead. The death of a process is mostly known at once, from its
# closed connections; this is for the rest (a host that lost its power, a wait that needs no connection).
_HEARTBEAT_TIMEOUT_SECONDS = 30
_EXIT_CODE = 1
_FIELDS = ("coordinator_address", "num_processes", "process_id")
# How the message of a failed communication begins, whichever exception brings it.
_BROKEN = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


class LostProcessError(ValueError):
    """Another process of the run has ended, so that this one cannot go on."""


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    report: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[None]:
    """Joins the other processes of the run, before JAX has been used for anything.

    While it holds, `jax.devices()` are those of all processes, and only the first process speaks: the log of the others
    shows errors only. If this process fails, it ends here and now with a message and an exit code that is not 0, so
    that the others, who cannot go on without it, notice at once and end too.

    Args:
      coordinator_address: `host:port`, where the first process listens; all three arguments or none. None of them takes
        the values of the cluster.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      report: makes a context that turns an error into a message and SystemExit, such as `cli.one_message`; without it
        an error shows its traceback.

    Raises:
      ValueError: for wrong or missing arguments, or if there is no cluster; no connection is tried then.
    """
    _check(coordinator_address, num_processes, process_id)
    # The training loop agrees on where to stop by itself; JAX would take its handler of SIGTERM away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"distributed: no cluster was found ({error}); valid: a start by a cluster that JAX knows (TPU pod, SLURM, "
            f"Kubernetes, Open MPI), or all of {_names()}"
        ) from error
    if not processes.is_first():
        for logger in ("", "effjax", "pallas_kernels"):
            logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        with report(), _lost_processes_named():
            yield
    except BaseException as error:
        if not processes.several():
            raise
        _leave(error)
    jax.distributed.shutdown()


@contextlib.contextmanager
def _lost_processes_named() -> Iterator[None]:
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not processes.several() or not _BROKEN.match(str(error)):
            raise
        raise LostProcessError(
            f"process {jax.process_index()} of {jax.process_count()} stops: a computation of all processes failed, as "
            "it does when one of them ends (if so, that one says why); start all of them again to go on from the last "
            f"complete checkpoint ({str(error).splitlines()[0][:300]})"
        ) from error


def _check(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if coordinator_address is None and num_processes is None and process_id is None:
        return
    if coordinator_address is None or num_processes is None or process_id is None:
        given = zip(_FIELDS, (coordinator_address, num_processes, process_id), strict=True)
        missing = next(name for name, value in given if value is None)
        raise ValueError(
            f"distributed.{missing} is missing; valid: all of {_names()}, or none on a cluster that JAX knows"
        )
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"distributed.coordinator_address={coordinator_address!r}; valid: host:port, such as 10.0.0.1:1234"
        )
    if num_processes < 1:
        raise ValueError(f"distributed.num_processes={num_processes}; valid: 1 or more")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"distributed.process_id={process_id}; valid: 0 to num_processes - 1 = {num_processes - 1}"
        )


def _names() -> str:
    return ", ".join(f"distributed.{name}" for name in _FIELDS)


def _leave(error: BaseException) -> NoReturn:
    """Says what happened and ends this process without JAX's farewell, which waits for processes that wait for us."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code  # it has been told
    else:
        code = _EXIT_CODE
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
