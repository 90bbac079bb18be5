"""What the processes of one program do together: agree, add up, fetch, wait.

One process runs on each host of a TPU pod or GPU cluster, all run the same program (SPMD), and `jax.distributed` has
made them known to each other. Every function here is called by all of them, in the same order, or they wait for each
other for ever; where there is only one process, each is what its name says and costs nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_AXIS = "device"


def is_first() -> bool:
    """Whether this is the process that writes the files and speaks for all; may be asked by any process alone."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there is more than one process; may be asked by any process alone."""
    return jax.process_count() > 1


def wait(what: str) -> None:
    """Returns when all processes have come here; `what` names the place in the error of one that came elsewhere."""
    if several():
        multihost_utils.sync_global_devices(what)


def every(holds: bool) -> bool:
    """Whether it holds on every process."""
    if not several():
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.array(holds))))


def from_first(values: Sequence[int]) -> list[int]:
    """The values that the first process has; those of the others, in any number, are ignored."""
    if not several():
        return list(values)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(values))))
    own = np.zeros(count, np.int32)
    if is_first():
        own[:] = values
    return multihost_utils.broadcast_one_to_all(own).tolist()


def fetch(tree: Any) -> Any:
    """`jax.device_get` that gives every process the whole of each array, wherever its parts are."""

    def whole(x: Any) -> Any:
        is_here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if is_here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def summed(values: Sequence[float]) -> Any:
    """Starts to add up the numbers of all processes, and does not wait for the sums.

    Args:
      values: equally many on each process.

    Returns:
      The sums, to be fetched later: float32 [len(values)] on the devices, so whole numbers are exact to 2^24. With one
      process, `values` themselves.
    """
    if not several():
        return values
    devices = tuple(jax.devices())
    by_device = NamedSharding(Mesh(np.array(devices), _AXIS), PartitionSpec(_AXIS))
    # The first device of each process speaks for it, and the others say 0.
    said = [np.zeros((1, len(values)), np.float32) for _ in jax.local_devices()]
    said[0][0] = values
    parts = [jax.device_put(x, d) for x, d in zip(said, jax.local_devices(), strict=True)]
    everyone = jax.make_array_from_single_device_arrays(
        (len(devices), len(values)), by_device, parts
    )
    return _sum(by_device.mesh)(everyone)


@functools.cache
def _sum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
