"""Batches out of several streams side by side, each of which makes its own rows of every batch.

The streams are numbered, and which rows a stream makes depends on nothing but its number. So a process may make only
the rows that it needs, the batches are the same however many processes share them out, and a state that some processes
saved can be given to others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

_STREAMS = "streams"


class RowsOfStreams(grain.IterDataset):
    """The wanted rows of batches to which each stream adds equally many, in the order of their numbers."""

    def __init__(
        self,
        stream: Callable[[int], grain.IterDataset],
        rows: Sequence[int],
        rows_per_stream: int,
    ):
        """Makes the streams that have one of the rows, and no others.

        Args:
          stream: the stream of a number; yields single rows, dicts of arrays.
          rows: increasing numbers of the wanted rows of a batch. Those of stream s are
            s * rows_per_stream .. (s + 1) * rows_per_stream - 1.
          rows_per_stream: rows of a batch that one stream makes.
        """
        self._numbers = sorted({row // rows_per_stream for row in rows})
        super().__init__([stream(number).batch(rows_per_stream) for number in self._numbers])
        made = [
            number * rows_per_stream + i for number in self._numbers for i in range(rows_per_stream)
        ]
        # None: all that is made is wanted.
        self._wanted = None if made == list(rows) else np.searchsorted(made, rows)

    def __iter__(self) -> grain.DatasetIterator:
        streams = {
            str(n): iter(parent) for n, parent in zip(self._numbers, self._parents, strict=True)
        }
        return _RowsIterator(streams, self._wanted)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, streams: Mapping[str, grain.DatasetIterator], wanted: np.ndarray | None):
        super().__init__(list(streams.values()))
        self._streams, self._wanted = streams, wanted

    def __next__(self) -> dict[str, np.ndarray]:
        parts = [next(stream) for stream in self._streams.values()]
        if len(parts) == 1 and self._wanted is None:
            return parts[0]
        batch = {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}
        if self._wanted is None:
            return batch
        return {field: array[self._wanted] for field, array in batch.items()}

    def get_state(self) -> dict[str, Any]:
        return {_STREAMS: {n: stream.get_state() for n, stream in self._streams.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, stream in self._streams.items():
            stream.set_state(state[_STREAMS][number])


class BatchesOfExamples(grain.MapDataset):
    """The wanted rows of batches of neighbouring examples; the other examples are not looked at.

    Batch i has the examples i * batch_size .. (i + 1) * batch_size - 1. The dataset is as long as its parent has whole
    batches, and the state of its iterators counts batches, not examples.
    """

    def __init__(self, examples: grain.MapDataset, rows: Sequence[int], batch_size: int):
        super().__init__(examples)
        self._rows, self._batch_size = tuple(rows), batch_size

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = index * self._batch_size
        chosen = [self._parent[first + row] for row in self._rows]
        return {field: np.stack([example[field] for example in chosen]) for field in chosen[0]}


def joined_state(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of the iterators of several processes as one, from which an iterator over any rows can go on.

    Raises:
      ValueError: if two of them are not of the same moment.
    """
    joined: dict[str, Any] = {}
    for state in states:
        parts = joined.setdefault(_STREAMS, {}) if _STREAMS in state else joined
        for name, value in state.get(_STREAMS, state).items():
            if parts.setdefault(name, value) != value:
                raise ValueError(
                    f"states of data differ in {name!r}: {parts[name]!r} and {value!r}"
                )
    return joined
