"""Compiles cases for TPUs that are not here and says what their schedules are.

A program of its own, started by `schedules`, which sets what libtpu reads from the environment when it is loaded, and
with it the folder of the dumps, which is the one argument. Each line of input is a `schedules.Job` in JSON, and is
answered by a line of JSON.
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

from benchmarks.kernels.case import Contender, compile_pass
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.schedules import BUNDLES, UTILIZATION, Job
from pallas_kernels.blocks import decided_by
from pallas_kernels.bundles import Kernel, read_kernel

# An instruction may be of several lines: the metadata of a kernel is as its author wrote it.
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%([\w.-]+) = ", re.M)
_KERNEL = 'custom_call_target="tpu_custom_call"'
_VMEM = re.compile(
    r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
)
_OP = re.compile(r"exit bundle: %([\w.-]+) = ")


def main(dump: Path) -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"schedule": _schedule(dump, Job(**json.loads(line)))}
        # Whatever the compiler says about this one, the others are worth having.
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


def _schedule(dump: Path, job: Job) -> dict:
    for path in dump.iterdir():
        path.unlink()
    case = next(case for case in CASES[job.op](False) if case.shape == job.shape)
    contender = next(x for x in case.contenders if x.name == job.contender)
    with decided_by(job.decide):
        compiled = compile_pass(case, contender, job.measured, job.chip)
    vmem = _vmem_of_kernels(compiled.as_text())
    ops = {op.name: op for op in _ops(dump)}
    kernels = [_with_steps(ops[name], contender) for name in vmem]
    others = [op for name, op in ops.items() if name not in vmem]
    return {
        "kernels": [_as_json(kernel, vmem[kernel.name]) for kernel in kernels],
        "xla_cycles": sum(op.cycles or op.step.bundles for op in others),
        # Each counted once, so that the cycles are a lower bound.
        "unknown_loops": sum(op.num_unknown_loops for op in [*kernels, *others])
        + sum(op.cycles is None for op in others),
    }


def _vmem_of_kernels(program_text: str) -> dict[str, int | None]:
    """Bytes of VMEM of each Pallas kernel of a compiled program, None where it does not say."""
    _, *parts = _INSTRUCTION.split(program_text)
    found = {}
    for name, instruction in zip(parts[::2], parts[1::2], strict=True):
        if _KERNEL in instruction:
            size = _VMEM.search(instruction)
            found[name] = int(size[1]) if size else None
    return found


def _ops(dump: Path) -> list[Kernel]:
    """All that was scheduled: the Pallas kernels and what XLA made itself."""
    ops = []
    for path in sorted(dump.glob(f"*-{BUNDLES}")):
        text = path.read_text()
        name = _OP.search(text)
        # The program around the ops is of none.
        if name is None:
            continue
        stem = path.name.removesuffix(f"-{BUNDLES}").rpartition("-")[0]
        (utilization,) = dump.glob(f"{stem}-*-{UTILIZATION}")
        ops.append(read_kernel(name[1], text, utilization.read_text()))
    return ops


def _with_steps(kernel: Kernel, contender: Contender) -> Kernel:
    steps = contender.steps(kernel)
    return kernel if steps is None else dataclasses.replace(kernel, steps=steps)


def _as_json(kernel: Kernel, vmem_bytes: int | None) -> dict:
    return {
        "name": kernel.name,
        "step_bundles": kernel.step.bundles,
        "steps": kernel.steps,
        "cycles": kernel.cycles,
        "cycles_with_all_regions": kernel.cycles_with_all_regions,
        "matmul_utilization": kernel.matmul_utilization,
        "vmem_bytes": vmem_bytes,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
