"""What an instruction of a compiled program costs: operations of the matrix units, and bytes to and from memory."""

import math
import re

import numpy as np

from effjax.training.planning.hlo import Computation, Instruction, Program, Shape
from effjax.training.planning.transfers import transfer

# These give a new name to what is there, or are no work of the device.
FREE = (
    *("parameter", "constant", "iota", "bitcast", "tuple", "get-tuple-element"),
    *("after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
    *("while", "conditional", "call", "async-start"),  # what they run counts by itself
)
_RESERVE = "AllocateBuffer"  # gives a place in memory, and leaves it as it is
# These read as much of their first operand as they return.
_READ_A_PART = ("dynamic-slice", "slice", "gather")
_RENAME = ("bitcast", "copy", "reshape", "transpose", "convert")


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """Operations of a product of matrices or a convolution, a multiplication and an addition each; 0 for all else.

    A TPU's compiler writes all products as convolutions, batches of them too: those as positions of a window, of which
    all but one fall on padding. Only positions that do not are counted.
    """
    if instruction.opcode == "dot":
        (left, *_), _ = (x.shapes for x in computation.operands(instruction))
        return _dot(instruction.shapes[0], left, _numbers(instruction, "lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        left, right = (x.shapes[0] for x in computation.operands(instruction)[:2])
        return _convolution(instruction, left, right)
    if instruction.opcode == "custom-call" and re.search("gemm|matmul", instruction.target or ""):
        return _library_product(instruction, computation)
    return 0.0


def memory_bytes(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Bytes that an instruction reads from and writes to the device's main memory.

    A fusion reads its operands and writes its results; of an operand that it only slices it reads the slices, and of a
    result that it only updates it writes the update. What lives in on-chip memory or with the host counts nothing.
    """
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0.0
    if instruction.target == _RESERVE:
        return 0.0
    copied = transfer(instruction, computation, program)
    if copied is not None:
        return float(copied.num_bytes * ((copied.source == 0) + (copied.target == 0)))
    operands = [_main_memory(x.shapes) for x in computation.operands(instruction)]
    results = _main_memory(instruction.shapes)
    if instruction.opcode in _READ_A_PART:
        return 2.0 * results
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * operands[1]
    if instruction.opcode != "fusion":
        return float(sum(operands) + results)
    inside = program.inside(instruction)
    read = sum(
        min(whole, _read_of(inside, parameter))
        for whole, parameter in zip(operands, _parameters(inside), strict=True)
    )
    return float(read + _written(inside, instruction))


def _dot(result: Shape, left: Shape, contracted: list[int]) -> float:
    return 2.0 * result.size * math.prod(left.dims[i] for i in contracted)


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> float:
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    window = _window(instruction)
    groups = int(instruction.attribute("feature_group_count") or 1)
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    features_in = left.dims[labels[1].index("f")] / groups
    features_out = right.dims[labels[2].index("o")]
    positions = 1
    for i in range(len(labels[1]) - 2):
        size, out = (
            left.dims[labels[1].index(str(i))],
            instruction.shapes[0].dims[labels[3].index(str(i))],
        )
        kernel = right.dims[labels[2].index(str(i))]
        positions *= _valid_positions(size, kernel, out, {k: v[i] for k, v in window.items()})
    batch = left.dims[labels[1].index("b")] / batch_groups
    return 2.0 * features_in * features_out * batch * positions


def _window(instruction: Instruction) -> dict[str, list[int]]:
    """Numbers of each spatial dimension, by what they are."""
    found = dict(re.findall(r"(\w+)=([\dx_-]+)", instruction.attribute("window") or ""))
    count = len(found.get("size", "").split("x")) if "size" in found else 0

    def numbers(name, default):
        return [int(x) for x in found[name].split("x")] if name in found else [default] * count

    pads = found["pad"].split("x") if "pad" in found else ["0_0"] * count
    return {
        "stride": numbers("stride", 1),
        "lhs_dilate": numbers("lhs_dilate", 1),
        "rhs_dilate": numbers("rhs_dilate", 1),
        "pad_low": [int(pad.split("_")[0]) for pad in pads],
    }


def _valid_positions(size: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """Pairs of a place in the result and a place in the kernel that meet an element, and not padding or a hole."""
    at = np.arange(out)[:, None] * window["stride"] - window["pad_low"]
    at = at + np.arange(kernel) * window["rhs_dilate"]
    dilation = window["lhs_dilate"]
    return int(np.count_nonzero((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)))


def _library_product(instruction: Instruction, computation: Computation) -> float:
    """Of a product that a library does: cuBLAS on GPUs, oneDNN on CPUs."""
    config = instruction.backend_config
    config = config.get("gemm_backend_config", config)
    numbers = config.get("dot_dimension_numbers")
    left = computation.operands(instruction)[0].shapes[0]
    contracted = (
        [int(i) for i in numbers["lhs_contracting_dimensions"]] if numbers else [len(left.dims) - 1]
    )
    return _dot(instruction.shapes[0], left, contracted)


def _numbers(instruction: Instruction, attribute: str) -> list[int]:
    return [int(x) for x in (instruction.attribute(attribute) or "").split(",") if x]


def _main_memory(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.num_bytes for shape in shapes if shape.memory_space == 0)


def _parameters(computation: Computation) -> list[Instruction]:
    found = (x for x in computation.instructions.values() if x.opcode == "parameter")
    return sorted(found, key=lambda x: int(x.argument))


def _read_of(computation: Computation, source: Instruction) -> float:
    """Bytes that a fusion reads of one of its operands, if it had to read each use of it once."""
    total = 0.0
    for user in computation.users[source.name]:
        if user.opcode in _READ_A_PART and user.operands[0] == source.name:
            total += sum(shape.num_bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue  # what is not updated stays where it is
        elif user.opcode in _RENAME and len(user.operands) == 1:
            total += _read_of(computation, user)
        else:
            return math.inf
    return total


def _written(computation: Computation, fusion: Instruction) -> float:
    """Bytes that a fusion writes: of an array that it updates in place, the update."""
    root = computation.root
    results = computation.operands(root) if root.opcode == "tuple" else (root,)
    if len(results) != len(fusion.shapes):
        return _main_memory(fusion.shapes)
    total = 0.0
    for result, shape in zip(results, fusion.shapes, strict=True):
        if shape.memory_space:
            continue
        while result.opcode in _RENAME and len(result.operands) == 1:
            result = computation.operands(result)[0]
        if result.opcode == "dynamic-update-slice":
            shape = computation.operands(result)[1].shapes[0]
        total += shape.num_bytes
    return total
