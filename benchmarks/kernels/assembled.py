"""What NVIDIA's assembler says of the GPU kernels, without a GPU: `python -m benchmarks.kernels.assembled`.

Each program is compiled for an H100, down to machine code, and Mosaic GPU keeps what the assembler says meanwhile:
registers of a thread, bytes that it spills because there are too few, and what it warns of, such as products that wait
for each other. That needs `jax[cuda13]`, and no GPU. What loops consist of is read from the machine code, where
nvdisasm is on the path (`pip install nvidia-cuda-nvdisasm`). Forward and backward share kernels with the forward alone,
which are assembled once, for the first who needs them.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.kernels.case import Case, compile_pass
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.sass import loops
from benchmarks.kernels.suite import check_names, versions

_CHIP = "h100"
# What the figures depend on; it is nvJitLink that assembles where there is one.
_PACKAGES = ("jax", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12", "nvidia-cuda-nvcc")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"smem_scratch_bytes=(\d+)")
_WARNING = re.compile(r"Potential Performance Loss: (.*)")
# Of a kernel's dumps: `NAME_3.ptxas` and `NAME_5.resources.txt`, as each is written when its turn comes.
_DUMP = re.compile(r"(\w+)_\d+\.(ptxas|resources\.txt|sass)(?:_ctrl)?")

_PAGE = """\
# GPU kernels as they are assembled

Made by `python -m benchmarks.kernels.assembled --publish`: the kernels of Mosaic GPU in bfloat16, compiled for an H100
on a host without a GPU, and what NVIDIA's assembler says of them. **None of them has been timed on a GPU.** Spilled are
bytes of a thread that it stores and loads because it has too few registers, anywhere in the kernel; a warning is what
the assembler calls a potential loss of performance, such as products that wait for each other. The kernels of a forward
are listed with the forward alone.

Of each loop, a step is given in instructions that a warp issues, masks of some tiles and copies left out, and in cycles
for which the products of its warpgroup keep the tensor cores busy at their peak. Two warpgroups share the tensor cores,
and two warps, one of each, a scheduler that issues an instruction a cycle: what is larger bounds the speed of a block
that has a multiprocessor to itself, if memory does not.

| op | shape | pass | kernel | registers | spilled, bytes | shared memory, KiB | step: instructions, cycles | warnings |
|---|---|---|---|--:|--:|--:|--:|---|
{lines}
{versions}
"""


def read(report: str, resources: str, sass: str | None) -> dict[str, Any]:
    """The figures of a kernel.

    Args:
        report: what the assembler said.
        resources: what Mosaic GPU said of the kernel's shared memory.
        sass: the machine code, or None.
    """
    spilled, shared = _SPILLED.search(report), _SHARED.search(resources)
    return {
        "registers": int(_REGISTERS.search(report)[1]),
        "spilled_bytes": [int(number) for number in spilled.groups()],
        "shared_bytes": int(shared[1]) if shared else 0,
        "loops": None if sass is None else [loop._asdict() for loop in loops(sass)],
        "warnings": sorted(set(_WARNING.findall(report))),
    }


def run(ops: Sequence[str]) -> dict[str, Any]:
    """Compiles the GPU kernels of every case of the ops.

    Returns:
        What JSON can hold: versions, and a row for each kernel of each case and pass.

    Raises:
        ValueError: an op is unknown, or JAX's CUDA plugin is missing.
    """
    check_names(ops, ())
    with _dumps() as folder:
        rows = [
            {"op": op, "shape": case.shape, "pass": measured, **kernel}
            for op in ops
            for case in CASES[op](False)
            for measured in case.work
            for kernel in _kernels(case, measured, folder)
        ]
    found = {name: version for name, version in versions(*_PACKAGES).items() if version}
    return {"chip": _CHIP, "versions": found, "rows": rows}


def has_disassembler() -> bool:
    """Whether machine code can be read here."""
    return shutil.which("nvdisasm") is not None


@contextlib.contextmanager
def _dumps() -> Iterator[Path]:
    """The folder to which the assembler's words on what is compiled in the context go."""
    # A program from the cache is not assembled again.
    is_caching = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as folder:
        variables = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        if has_disassembler():
            variables["MOSAIC_GPU_DUMP_SASS"] = "1"
        os.environ |= variables
        try:
            yield Path(folder)
        finally:
            for name in variables:
                del os.environ[name]
            jax.config.update("jax_enable_compilation_cache", is_caching)


def _kernels(case: Case, measured: str, dump: Path) -> list[dict[str, Any]]:
    for contender in case.contenders:
        if contender.name == "gpu":
            compile_pass(case, contender, measured, _CHIP)
    said: dict[str, dict[str, str]] = {"ptxas": {}, "resources.txt": {}, "sass": {}}
    for path in sorted(dump.iterdir()):
        if name := _DUMP.fullmatch(path.name):
            said[name[2]][name[1]] = path.read_text()
        path.unlink()
    return [
        {"kernel": name} | read(report, said["resources.txt"][name], said["sass"].get(name))
        for name, report in said["ptxas"].items()
    ]


def document(report: dict[str, Any]) -> str:
    """The page of what `run` returns."""
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    named = [
        [row[key] for key in ("op", "shape", "pass", "kernel")] + _figures(row)
        for row in report["rows"]
    ]
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in named)
    return _PAGE.format(lines=lines, versions=packages)


def _figures(row: dict[str, Any]) -> list[str]:
    stored, loaded = row["spilled_bytes"]
    return [
        str(row["registers"]),
        f"{stored} + {loaded}" if stored or loaded else "0",
        f"{row['shared_bytes'] / 2**10:.0f}",
        "; ".join(f"{x['instructions']}, {x['tensor_cycles']}" for x in row["loops"] or ()),
        "; ".join(row["warnings"]),
    ]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if not has_disassembler():
        missing = "nvdisasm is not on the path (pip install nvidia-cuda-nvdisasm)"
        if flags.FLAGS.publish:
            raise app.UsageError(f"--publish: {missing}")
        Console(stderr=True).print(f"{missing}: loops are left out")
    try:
        report = run(flags.FLAGS.op)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "assembled.json").write_text(json.dumps(report, indent=2) + "\n")
    if flags.FLAGS.publish:
        Path("docs/GPU_KERNELS.md").write_text(document(report))
    Console().print(_table(report["rows"]))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Kernels as assembled for {_CHIP}, bfloat16", title_justify="left")
    table.add_column("program, kernel")
    for heading in ("registers", "spilled", "shared KiB", "instructions, cycles"):
        table.add_column(heading, justify="right")
    table.add_column("warnings")
    for case, of_case in groupby(rows, key=lambda row: (row["op"], row["shape"], row["pass"])):
        table.add_section()
        table.add_row(Text(", ".join(case), style="bold"))
        for row in of_case:
            table.add_row(f"  {row['kernel']}", *_figures(row))
    return table


if __name__ == "__main__":
    flags.DEFINE_list("op", list(CASES), "Ops to compile.")
    flags.DEFINE_string("out", "benchmarks/results/kernels", "Folder of the JSON.")
    flags.DEFINE_bool("publish", False, "Also write docs/GPU_KERNELS.md.")
    app.run(main)
