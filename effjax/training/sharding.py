"""Meshes, and where each array of a run lives on one.

Parameters are plain arrays; a table from parameter paths to logical axes says what their dimensions mean, and a table
from logical to mesh axes says how each meaning is split. The compiler derives the rest.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax import pytree

logger = logging.getLogger(__name__)

# The memory of a host that its devices can copy to and from at full speed.
HOST_MEMORY = "pinned_host"
MESH_AXES = ("pipeline", "data", "fsdp", "tensor", "expert", "context")

# Logical axes of the trailing dimensions of each parameter. A leading one is that of scanned layers.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"embed/(position|type)", (None, "embed")),
    (r"unembed/kernel", ("embed", "vocab")),
    (r"(query|key|value)/kernel", ("embed", "heads")),
    (r"out/kernel", ("heads", "embed")),
    (r"experts/(gate|up)", ("expert", "embed", "mlp")),
    (r"experts/down", ("expert", "mlp", "embed")),
    (r"(gate|up)/kernel", ("embed", "mlp")),
    (r"down/kernel", ("mlp", "embed")),
    (r"(router|step|step_down|B|C)/kernel", ("embed", None)),
    (r"step_up/kernel", (None, "mlp")),
    (r"conv", (None, "mlp")),
    (r"\w*(scale|bias)|D", (None,)),
    (r"kernel", ("embed", None)),  # the last resort: a matrix that no line above knows
)

_OF_LAYERS = r"blocks_\d+/.*"

# Logical to mesh axes; `batch` is the leading dimension of activations, `group` that of expert buffers.
AXIS_RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("pipeline", "data", "fsdp", "expert")),
    ("group", ("data", "fsdp")),  # rows on their way to experts, which take the expert axis
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("expert", "expert"),
    ("length", "context"),  # rows too long for one device
    ("stage", "pipeline"),  # scanned layers; around them a stage has rows of its own, as above
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES`.

    Args:
      sizes: size of each axis; absent axes are 1, and at most one may be -1: all the devices that are left.
      devices: the devices to use, all of them by default; a smaller mesh takes the first ones.

    Raises:
      ValueError: for an unknown axis, a size that is not positive, or a mesh that does not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for axis in sizes:
        if axis not in MESH_AXES:
            raise ValueError(f"mesh: unknown axis {axis!r}; valid: {', '.join(MESH_AXES)}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 or any(size < 1 for axis, size in shape.items() if axis not in free):
        raise ValueError(
            f"mesh: sizes {shape}; valid: positive numbers, at most one -1 (all that is left)"
        )
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if fixed > len(devices) or (free and len(devices) % fixed):
        raise ValueError(
            f"mesh: {shape} needs {'a multiple of ' if free else ''}{fixed} devices, "
            f"and there are {len(devices)}; valid: sizes whose product divides the devices"
        )
    for axis in free:
        shape[axis] = len(devices) // fixed
    count = int(np.prod(list(shape.values())))
    grid = np.array(devices[:count]).reshape(tuple(shape.values()))
    return Mesh(grid, MESH_AXES)


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that the batch axis is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in dict(AXIS_RULES)["batch"]]))


def check_batch(batch_size: int, seq_len: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises ValueError unless the mesh cuts batches of that size into equal parts, a micro-batch at a time."""
    check_rows("data.batch_size", batch_size, mesh, accumulation_steps)
    if seq_len % mesh.shape["context"]:
        raise ValueError(
            f"data.seq_len={seq_len}; valid: a multiple of mesh.context={mesh.shape['context']}"
        )


def check_rows(field: str, count: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises ValueError, naming the field, unless the mesh cuts so many rows into equal parts."""
    parts = batch_shards(mesh) * accumulation_steps
    if count < 1 or count % parts:
        axes = " x ".join(dict(AXIS_RULES)["batch"])
        times = ", times training.accumulation_steps" if accumulation_steps > 1 else ""
        raise ValueError(f"{field}={count}; valid: a multiple of {parts} (mesh axes {axes}{times})")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lives: rows split, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(dict(AXIS_RULES)["batch"]))


def state_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Shardings for a train state (or any tree with parameter paths in it), leaf by leaf.

    Optimizer moments carry the paths of their parameters and live where those live. A dimension that its mesh axis does
    not divide is left whole, and the log says so.
    """
    return pytree.map_paths(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(path, leaf.shape, mesh)), shapes
    )


def abstract_state(init: Callable[[], Any], mesh: Mesh, offload_optimizer: bool = False) -> Any:
    """The types of what `init` returns, each with the sharding that `state_shardings` gives it; nothing is run.

    Args:
      init: makes a train state, or any tree with parameter paths in it.
      mesh: where that lives.
      offload_optimizer: the arrays of a train state's `opt_state` live in the memory of the hosts.
    """
    shapes = jax.eval_shape(init)
    state = jax.tree.map(_typed, shapes, state_shardings(shapes, mesh))
    if not offload_optimizer:
        return state
    opt_state = jax.tree.map(_on_host, state.opt_state)
    return dataclasses.replace(state, opt_state=opt_state)


def _typed(shape: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def _on_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return _typed(x, x.sharding.with_memory_kind(HOST_MEMORY)) if x.ndim else x


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the parameter at `path` is split over the mesh."""
    rules = dict(AXIS_RULES)
    logical = next((axes for pattern, axes in PARAMETER_AXES if pytree.matches(pattern, path)), ())
    if len(logical) > len(
        shape
    ):  # factored moments (adafactor) lack a dimension of their parameter
        return PartitionSpec()
    leading = [None] * (len(shape) - len(logical))
    if logical and len(leading) == 1 and pytree.matches(_OF_LAYERS, path):
        leading = [rules["stage"]]
    spec = leading + [None if axis is None else rules.get(axis) for axis in logical]
    for i, axis in enumerate(spec):
        if axis is not None and shape[i] % mesh.shape[axis]:
            if shape[i] > 1:
                logger.warning(
                    "%s: dimension %d of size %d is kept whole, mesh axis %r of size %d does not divide it",
                    path, i, shape[i], axis, mesh.shape[axis],
                )  # fmt: skip
            spec[i] = None
    return PartitionSpec(*spec)
