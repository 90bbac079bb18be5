"""Cycles of Pallas kernels: from the schedules that the TPU's compiler makes of them, which it can be told to leave.

A kernel issues one bundle of instructions a cycle where nothing stalls, so that its bundles, times the steps of its
grid, are the cycles that it takes at least (`pallas_kernels.bundles`).
"""

import os
from pathlib import Path

from pallas_kernels.bundles import read_kernel

_FLAGS = {
    "xla_jf_dump_llo_text": "true",
    "xla_jf_emit_annotations": "true",
    # All stages of a kernel are hundreds of megabytes.
    "xla_jf_dump_llo_pass_label_regex": "final",
}
_BUNDLES = "final_bundles.txt"
_UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"


def leave(folder: str | Path) -> None:
    """Tells the TPU's compiler to leave its schedules in an empty folder.

    It listens once, when it is loaded: before the first program of this process is compiled for a TPU.
    """
    flags = [f"--{name}={value}" for name, value in {"xla_jf_dump_to": folder, **_FLAGS}.items()]
    already = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([already, *flags]).strip()


def forget(folder: str | Path | None) -> None:
    """Empties the folder, if there is one, before another program is compiled."""
    for path in Path(folder).iterdir() if folder else ():
        path.unlink()


def cycles(folder: str | Path, name: str) -> int | None:
    """Cycles of the kernel that an instruction of the compiled program calls; None if the folder does not say.

    Args:
      folder: where the schedules of one program are.
      name: of the instruction.
    """
    for path in Path(folder).glob(f"*-{name}-*-{_BUNDLES}"):
        stem = path.name.removesuffix(f"-{_BUNDLES}").rpartition("-")[0]
        (utilization,) = path.parent.glob(f"{stem}-*-{_UTILIZATION}")
        return read_kernel(name, path.read_text(), utilization.read_text()).cycles
    return None
