"""Bytes that the Pallas kernels of a program copy between HBM and VMEM, and the VMEM that they hold.

A kernel's grid runs in order, and before each of its steps the blocks that the index maps name are in VMEM. A block
that the step before had already is not copied again; an output block goes back when the next step has another. So the
index maps, evaluated over the grid, say how many blocks are copied (`jax.experimental.pallas`, "pipelining").
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pallas_kernels import topology

_VMEM = re.compile(
    r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
)


class Copies(NamedTuple):
    """Of the kernels of a program.

    Attributes:
      hbm_bytes: copied from HBM and to it.
      compulsory_bytes: of all operands and results of the kernels once: what no kernel can do without.
      vmem_bytes: of the kernel that holds the most, as the compiler allotted it.
    """

    hbm_bytes: int
    compulsory_bytes: int
    vmem_bytes: int


def measure(chip: str, function: Callable, *shapes: jax.ShapeDtypeStruct) -> Copies:
    """Compiles `function` for a TPU that need not be here, and counts.

    Raises:
      ValueError: it has no Pallas kernel.
      Exception: what the compiler says about a kernel that the chip cannot run.
    """
    with jax.set_mesh(topology.mesh(chip)):
        traced = jax.make_jaxpr(function)(*shapes)
        compiled = topology.compile_for(chip, function, *shapes)
    vmem = max(int(size) for size in _VMEM.findall(compiled.as_text()))
    return Copies(*traffic(traced), vmem)


def traffic(traced: ClosedJaxpr) -> tuple[int, int]:
    """`hbm_bytes` and `compulsory_bytes` of the kernels of a traced program.

    Raises:
      ValueError: it has no Pallas kernel.
    """
    constants = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    counted = [_count(*call) for call in _calls(traced.jaxpr, constants)]
    if not counted:
        raise ValueError("the program has no Pallas kernel")
    copied, compulsory = (sum(column) for column in zip(*counted, strict=True))
    return copied, compulsory


def _calls(jaxpr: Jaxpr, known: Mapping) -> Iterator[tuple[Any, list]]:
    """The grid of each kernel, and the scalars that its index maps read."""
    for equation in jaxpr.eqns:
        inputs = [x.val if isinstance(x, Literal) else known.get(x) for x in equation.invars]
        if equation.primitive.name == "pallas_call":
            grid = equation.params["grid_mapping"]
            yield grid, inputs[: grid.num_index_operands]
            continue
        for inner in equation.params.values():
            if isinstance(inner, ClosedJaxpr) and len(inner.jaxpr.invars) == len(inputs):
                of_inputs = zip(inner.jaxpr.invars, inputs, strict=True)
                of_constants = zip(inner.jaxpr.constvars, inner.consts, strict=True)
                values = {x: y for x, y in (*of_inputs, *of_constants) if y is not None}
                yield from _calls(inner.jaxpr, values)


def _count(grid: Any, scalars: list) -> tuple[int, int]:
    """(bytes copied, bytes of all operands and results once)."""
    steps = np.indices(grid.grid, np.int32).reshape(len(grid.grid), -1)
    copied = compulsory = 0
    for operand in grid.block_mappings:
        start = jax.vmap(lambda step, x=operand: x.compute_start_indices_interpret(step, *scalars))
        starts = np.stack([np.broadcast_to(x, steps.shape[1]) for x in start(tuple(steps))])
        num_blocks = 1 + np.any(starts[:, 1:] != starts[:, :-1], axis=0).sum()
        array = operand.array_aval
        block = [getattr(size, "block_size", 1) for size in operand.block_shape]
        copied += int(num_blocks) * math.prod(block) * array.dtype.itemsize
        compulsory += math.prod(array.shape) * array.dtype.itemsize
    return copied, compulsory
