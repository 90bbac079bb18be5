"""Which rows of each batch a process makes, and how they come onto the mesh.

A process makes the rows that its devices hold. Where a mesh axis that does not split the batch (`tensor`) spans
processes, several of them hold the same rows, and each makes its own copy.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from effjax.training import sharding


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process makes of every batch.

    Attributes:
      batch_sharding: where a batch lives.
      batch_size: rows of a batch over all processes.
      rows: int64 [R], the rows that the devices of this process hold, increasing.
      counted: bool [R], which of them no process before this one holds; over all processes, each row of a batch is
        counted once.
    """

    batch_sharding: NamedSharding
    batch_size: int
    rows: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, mesh: Mesh, batch_size: int, process: int | None = None) -> "Share":
        """The share of a process on a mesh, this one by default.

        Raises:
          ValueError: if a process has no device on the mesh.
        """
        process = jax.process_index() if process is None else process
        where = sharding.batch_sharding(mesh)
        held = {number: np.zeros(batch_size, bool) for number in range(jax.process_count())}
        for device, (part, *_) in where.devices_indices_map((batch_size,)).items():
            held[device.process_index][part] = True  # type: ignore[attr-defined] # `Device` is no type in JAX's hints
        idle = [number for number, rows in held.items() if not rows.any()]
        if idle:
            raise ValueError(
                f"mesh: {dict(mesh.shape)} has {mesh.size} of the {jax.device_count()} devices, and none of process "
                f"{idle[0]}; valid: sizes whose product is {jax.device_count()}"
            )
        before = np.zeros(batch_size, bool)
        for number in range(process):
            before |= held[number]
        rows = np.flatnonzero(held[process])
        return cls(where, batch_size, rows, counted=~before[rows])

    def counted_rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those rows of this process's part of a batch that it counts for all."""
        if self.counted.all():
            return dict(batch)
        return {name: array[self.counted] for name, array in batch.items()}

    def on_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the mesh; every process gives its rows of it, [R, ...] each."""
        return {name: self._on_devices(array) for name, array in batch.items()}

    def _on_devices(self, array: np.ndarray) -> jax.Array:
        shape = (self.batch_size, *array.shape[1:])
        part = functools.partial(self._part, array)
        return jax.make_array_from_callback(shape, self.batch_sharding, part)

    def _part(self, array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """The rows of a device, which lie together in those of its process as they do in the batch."""
        start, stop, _ = index[0].indices(self.batch_size)
        first = np.searchsorted(self.rows, start)
        return array[first : first + stop - start]
