"""What of a chip's memory a training step takes, and for what."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from effjax.evaluation.cost import measure_memory
from effjax.training import sharding

# What the TPU compiler says of a program that does not fit; what it calls temporaries has the arguments in it.
_REFUSALS = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(
        r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
    ),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each chip.

    Attributes:
      parameters: the chip's share of them; of a program that decodes too.
      optimizer: the optimizer's state.
      other: the rest of what the program is given: averaged parameters, the batch, decode states, and what tiles of the
        memory pad.
      temporaries: activations, gradients and all else between, and results that take no argument's place.
      total: all of them.
      capacity: what the chip has; None where it is not known.
      host: the chip's share of what is kept in the memory of its host instead, and counted in none of these.
    """

    parameters: int
    optimizer: int
    other: int
    temporaries: int
    total: int
    capacity: float | None
    host: int = 0

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.capacity is None or self.total <= self.capacity


def share(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of their types, with shardings; those on its host do not count."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != sharding.HOST_MEMORY
    )


def of_program(compiled: Any, params: Any, opt_state: Any, capacity: float | None) -> Memory:
    """The memory of a compiled program.

    Args:
      compiled: the program.
      params: the parameters, or their types, with shardings.
      opt_state: the optimizer's state likewise; None for a program that has none.
      capacity: bytes that the chip has.
    """
    found = measure_memory(compiled)
    parameters, optimizer = share(params), share(opt_state)
    other = found.arguments - parameters - optimizer
    temporaries = found.peak - found.arguments
    return Memory(parameters, optimizer, other, temporaries, found.peak, capacity, host=found.host)


def of_failure(error: Exception, params: Any, opt_state: Any) -> Memory | None:
    """The memory of a program that the compiler refuses because it does not fit; None for any other error."""
    parameters, optimizer = share(params), share(opt_state)
    for pattern in _REFUSALS:
        found = pattern.search(str(error))
        if found is not None:
            needed = round(float(found[1]) * _UNITS[found[2]])
            capacity = float(found[3]) * _UNITS[found[4]]
            rest = needed - parameters - optimizer
            return Memory(parameters, optimizer, 0, rest, needed, capacity)
    return None
