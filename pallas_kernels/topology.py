"""Compiling for chips that are not here: the real compilers run on any host.

For TPUs that is libtpu (`pip install libtpu`), for GPUs JAX's CUDA plugin (`pip install "jax[cuda13]"`).
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The smallest of each kind, for programs of one chip.
ONE_CHIP = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# GPUs, each with XLA's description of it.
GPU_TARGETS = {path.stem: path for path in Path(__file__).with_name("gpu_targets").iterdir()}


def is_available(platform: str = "tpu") -> bool:
    """Whether the compiler for "tpu" or "gpu" is installed."""
    modules = ("libtpu",) if platform == "tpu" else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return any(importlib.util.find_spec(module) for module in modules)


def mesh(topology: str, shape: Sequence[int] | None = None, axis_names=("data",)) -> Mesh:
    """A mesh of absent chips, to compile under (`jax.set_mesh`).

    Args:
        topology: TPUs, "v5e:4x4", "v6e:2x2", "v5p:8x8x8"; GPUs as hosts x GPUs of each, "h100:2x8"; or a bare kind,
            "v5e", for one chip.
        shape: sizes of the axes; None: all chips along one.
        axis_names: names of the axes.

    Raises:
        ValueError: the compiler is missing or knows no such topology, or the chips do not fit the shape.
    """
    kind, _, sizes = topology.partition(":")
    devices = _gpus(topology, kind, sizes) if kind in GPU_TARGETS else _tpus(topology, kind, sizes)
    shape = (devices.size,) if shape is None else tuple(shape)
    if np.prod(shape) != devices.size:
        raise ValueError(
            f"topology={topology!r} has {devices.size} chips; shape={shape} does not fit"
        )
    return Mesh(devices.reshape(shape), axis_names, axis_types=(AxisType.Auto,) * len(shape))


def _tpus(topology: str, kind: str, sizes: str) -> np.ndarray:
    if not is_available("tpu"):
        raise ValueError(f"topology={topology!r} needs libtpu: pip install libtpu")
    # Nothing is executed, so nobody has to be asked about a pod and no chip has to be locked.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = topology if sizes else ONE_CHIP.get(kind, topology)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology={topology!r} is not known to libtpu; valid: {', '.join([*ONE_CHIP, *GPU_TARGETS])}, or one "
            f"of these with a shape, such as v5e:4x4 ({error})"
        ) from error
    return np.array(found.devices if sizes else found.devices[:1])


def _gpus(topology: str, kind: str, sizes: str) -> np.ndarray:
    if not is_available("gpu"):
        raise ValueError(
            f"topology={topology!r} needs JAX's CUDA plugin: pip install 'jax[cuda13]'"
        )
    counts = (sizes or "1x1").split("x")
    if len(counts) != 2 or not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise ValueError(
            f"topology={topology!r} must be {kind}, or {kind} with hosts x GPUs of each: {kind}:2x8"
        )
    # The plugin asks for a GPU before it registers, unless told that programs are only compiled.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=GPU_TARGETS[kind].read_text(),
        topology="x".join(["1", *counts]),
    )
    return np.array(found.devices)


def compile_for(topology: str, function: Callable, *arrays) -> jax.stages.Compiled:
    """Compiles `jax.jit(function)` for absent chips, each of which gets all of the arrays.

    Args:
        topology: as `mesh` takes it; more than one chip are along the mesh axis "data".
        function: what to compile.
        *arrays: pytrees of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: the compiler is missing or knows no such topology.
        Exception: what the compiler says about a kernel that the hardware cannot run.
    """
    chips = mesh(topology)
    whole = NamedSharding(chips, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arrays)
    with jax.set_mesh(chips):
        return jax.jit(function).lower(*shapes).compile()
