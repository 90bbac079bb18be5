"""Compiling for TPUs that are not here: libtpu is the real compiler, and it runs on any host.

Needs libtpu (`pip install libtpu`) and no TPU.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The smallest of each kind, for programs of one chip.
ONE_CHIP = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def is_available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def mesh(topology: str, shape: Sequence[int] | None = None, axis_names=("data",)) -> Mesh:
    """A mesh of absent chips, to compile under (`jax.set_mesh`).

    Args:
        topology: "v5e:4x4", "v6e:2x2", "v5p:8x8x8"; or a bare kind, "v5e", for one chip.
        shape: sizes of the axes; None: all chips along one.
        axis_names: names of the axes.

    Raises:
        ValueError: libtpu is missing or knows no such topology, or the chips do not fit the shape.
    """
    if not is_available():
        raise ValueError(f"topology={topology!r} needs libtpu: pip install libtpu")
    # Nothing is executed, so nobody has to be asked about a pod and no chip has to be locked.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=ONE_CHIP.get(topology, topology)
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology={topology!r} is not known to libtpu; valid: {', '.join(ONE_CHIP)}, or one of "
            f"these with a shape, such as v5e:4x4 ({error})"
        ) from error
    devices = np.array(found.devices[:1] if topology in ONE_CHIP else found.devices)
    shape = (devices.size,) if shape is None else tuple(shape)
    if np.prod(shape) != devices.size:
        raise ValueError(
            f"topology={topology!r} has {devices.size} chips; shape={shape} does not fit"
        )
    return Mesh(devices.reshape(shape), axis_names, axis_types=(AxisType.Auto,) * len(shape))


def compile_for(topology: str, function: Callable, *arrays) -> jax.stages.Compiled:
    """Compiles `jax.jit(function)` for one absent chip.

    Args:
        topology: a kind of chip, one of `ONE_CHIP`.
        function: what to compile.
        *arrays: pytrees of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: libtpu is missing.
        Exception: what the compiler says about a kernel that the hardware cannot run.
    """
    chip = mesh(topology)
    whole = NamedSharding(chip, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arrays)
    with jax.set_mesh(chip):
        return jax.jit(function).lower(*shapes).compile()
