"""Block sizes of kernels: what a tuner found for a kind of device and a shape, or else what the op's rule says.

The folder of an op may hold `blocks.json`, which `python -m benchmarks.kernels.tune` writes. Its keys are kinds of
devices, as `jax.Device.device_kind` says:

    {"TPU v5 lite": [{"shape": {"time": 2048, "heads": 8}, "sizes": {"chunk": 256, "tokens": 1024}}]}

An entry is for the shapes that have its numbers, of which lengths stand for a bucket: 2048 for 1025 to 2048.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Sizes = Mapping[str, int]
Shape = Mapping[str, int | str | None]


@dataclasses.dataclass(frozen=True)
class Table:
    """The table of an op.

    Attributes:
        path: of its `blocks.json`, which need not be there; the folder has the op's name.
        lengths: numbers of a shape that are rounded up to powers of two.
        others: what else is of a shape.
        sizes: names of the sizes.
        flaw: (sizes, shape) -> what is wrong with these sizes at that shape, or None.
    """

    path: Path
    lengths: tuple[str, ...]
    others: tuple[str, ...]
    sizes: tuple[str, ...]
    flaw: Callable[[Sizes, Shape], str | None]

    def choose(self, device_kind: str, by_rule: Sizes, **shape: int | str | None) -> Sizes:
        """Sizes at `shape`: those of the entry for it, or else `by_rule`.

        Raises:
            ValueError: the file has an entry that cannot be.
        """
        shape = {
            name: bucket(value) if name in self.lengths else value for name, value in shape.items()
        }
        sizes = _entries(self).get((device_kind, _key(shape)), by_rule)
        decide = _decide.get()
        if decide is None:
            return sizes
        decided = decide(Choice(self, device_kind, shape, by_rule))
        return sizes if decided is None else decided


class Choice(NamedTuple):
    """What a kernel asked for, with the lengths of `shape` in buckets, and what its op's rule would give it."""

    table: Table
    device_kind: str
    shape: Shape
    by_rule: Sizes

    @property
    def name(self) -> str:
        """The op and the shape in words."""
        op = self.table.path.parent.name
        return " ".join([op, *(f"{name}={value}" for name, value in self.shape.items())])


_decide: contextvars.ContextVar[Callable[[Choice], Sizes | None] | None] = contextvars.ContextVar(
    "decide", default=None
)


@contextlib.contextmanager
def decided_by(decide: Callable[[Choice], Sizes | None]) -> Iterator[None]:
    """Within, as programs are traced, `decide` is called at each choice and gives the sizes; None: as otherwise.

    For tuners and tests. What `jax.jit` traced before keeps its sizes.
    """
    token = _decide.set(decide)
    try:
        yield
    finally:
        _decide.reset(token)


def bucket(length: int) -> int:
    """The power of two that `length` is rounded up to."""
    return 1 << max(0, length - 1).bit_length()


def round_up(number: int, multiple: int) -> int:
    """To the next multiple."""
    return number + -number % multiple


def largest_divisor(number: int, limit: int) -> int:
    """The largest one of `number` up to `limit`, or 1."""
    return max((x for x in range(1, limit + 1) if number % x == 0), default=1)


@functools.cache
def _entries(table: Table) -> dict[tuple, Sizes]:
    return read(table)


def read(table: Table) -> dict[tuple, Sizes]:
    """The entries of a table's file, {(device kind, key of a shape): sizes}; none without a file.

    Raises:
        ValueError: naming file and entry, where the file or an entry is malformed or the sizes cannot be.
    """
    if not table.path.exists():
        return {}
    try:
        by_kind = json.loads(table.path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{table.path}: no JSON: {error}") from error
    if not isinstance(by_kind, dict) or not all(isinstance(x, list) for x in by_kind.values()):
        raise ValueError(f"{table.path}: must be an object of kinds of devices, each with a list")
    found = {}
    for kind, entries in by_kind.items():
        for entry in entries:
            where = f"{table.path}: entry {json.dumps(entry)} of {kind!r}"
            flaw = _flaw(table, entry)
            if flaw is not None:
                raise ValueError(f"{where}: {flaw}")
            key = (kind, _key(entry["shape"]))
            if key in found:
                raise ValueError(f"{where}: there is another one of that shape")
            found[key] = entry["sizes"]
    return found


def _flaw(table: Table, entry: Any) -> str | None:
    """What is wrong with an entry."""
    names = {"shape": (*table.lengths, *table.others), "sizes": table.sizes}
    if not isinstance(entry, dict) or set(entry) != set(names):
        return f"must be an object of {' and '.join(names)}"
    for part, valid in names.items():
        if not isinstance(entry[part], dict) or set(entry[part]) != set(valid):
            return f"{part} must have the keys {', '.join(valid)}"
    shape, sizes = entry["shape"], entry["sizes"]
    for name, value in [(name, shape[name]) for name in table.lengths] + [*sizes.items()]:
        if type(value) is not int or value < 1:
            return f"{name}={value!r} is no positive integer"
    for name in table.lengths:
        if shape[name] != bucket(shape[name]):
            return f"{name}={shape[name]} is no power of two, to which lengths are rounded up"
    return table.flaw(sizes, shape)


def _key(shape: Shape) -> frozenset:
    return frozenset(shape.items())
