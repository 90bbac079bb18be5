"""What the tests of Triton kernels share: compiling the kernels of a program for a GPU that is not here."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
from jax.sharding import AbstractDevice, AbstractMesh
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import triton_call

# Shared memory that a block may have, by compute capability: CUDA programming guide, table of technical specifications.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Compiled(NamedTuple):
    """What the compilers say of a kernel: bytes of shared memory and of spilled registers, stored and loaded."""

    name: str
    shared: int
    spilled: tuple[int, int]


def compile_kernels(monkeypatch, function, *arrays, capability: int) -> list[Compiled]:
    """Compiles every kernel that `function` calls on a GPU, down to machine code, for a compute capability."""
    device = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    calls = []

    def record(kernel, arguments, types, grid, constants, launch):
        calls.append((kernel, arguments, types, constants, launch))
        return [jnp.zeros(x.shape, x.dtype) for x in types]

    monkeypatch.setattr(triton_call, "_compiled", record)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(function, *arrays)
    found = [_compile(*call, capability) for call in calls]
    print(*found, sep="\n")
    return found


def _compile(kernel, arguments, types, constants, launch, capability: int) -> Compiled:
    """As jax_triton calls the compiler: pointers to 16 bytes, everything else constant."""
    names = [parameter.name for parameter in kernel.params]
    arrays = dict(zip(names, [*arguments, *types], strict=False))
    pointers = {name: POINTERS[str(x.dtype)] for name, x in arrays.items() if x is not None}
    constants = constants | {name: None for name, x in arrays.items() if x is None}
    signature = {name: pointers.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    return Compiled(
        kernel.fn.__name__, compiled.metadata.shared, _spilled(compiled.asm["ptx"], capability)
    )


def _spilled(ptx: str, capability: int) -> tuple[int, int]:
    name = f"sm_{capability}" + "a" * (capability >= 90)
    command = [PTXAS, "--verbose", f"--gpu-name={name}", "-", f"--output-file={os.devnull}"]
    text = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return tuple(
        int(re.search(rf"(\d+) bytes spill {kind}", text)[1]) for kind in ("stores", "loads")
    )
