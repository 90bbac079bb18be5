"""One paper, as the catalogue knows it."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

NOT_MEASURED = "not measured yet"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a paper is in this library, and what shows that it works. Paths are relative to the repository.

    Attributes:
      id: a short name, that of its file in `papers/`.
      name: what the method is called.
      title: of the paper.
      paper: its address.
      family: what kind of method it is, one of `effjax.catalog.families()`.
      summary: what it does, and what is saved by it.
      symbols: dotted names of what implements it, the main one first; `resolve` imports one.
      tests: files, or `file::test`, that hold it to an independent reference.
      code: the authors' repository on GitHub, "owner/name"; None if there is none, or none is known.
      configs: what to give as `--config`, with further flags after it, the smallest first; () if it is one call.
      benchmarks: modules that measure what it costs, as for `python -m`.
      result: where the measured headline claim is written down, `file` or `file#section`; None: not measured yet.
    """

    id: str
    name: str
    title: str
    paper: str
    family: str
    summary: str
    symbols: tuple[str, ...]
    tests: tuple[str, ...]
    code: str | None = None
    configs: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    result: str | None = None

    @property
    def claim(self) -> str:
        """Where the result of the claim benchmark stands, or that there is none yet."""
        return self.result or NOT_MEASURED


def parse(id: str, fields: Mapping[str, Any]) -> Entry:
    """The entry with these fields, as a TOML file holds them.

    Raises:
      ValueError: naming the entry and the field, if one is unknown, missing, empty or of another type.
    """
    known = {field.name: field for field in dataclasses.fields(Entry) if field.name != "id"}
    for name in fields:
        if name not in known:
            raise ValueError(f"catalog: {id}: unknown field {name!r}; valid: {', '.join(known)}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and not fields.get(name):
            raise ValueError(f"catalog: {id}: missing field {name!r}")
    return Entry(id, **{name: _value(id, known[name], value) for name, value in fields.items()})


def resolve(symbol: str) -> Any:
    """What a dotted name stands for; the longest part of it that is a module is imported.

    Raises:
      ImportError: if nothing is called so.
    """
    module, _, name = symbol.rpartition(".")
    found = importlib.import_module(module) if module else None
    if not hasattr(found, name):
        raise ImportError(f"{module or symbol!r} has no {name!r}")
    return getattr(found, name)


def _value(id: str, field: dataclasses.Field, value: Any) -> Any:
    if field.type == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise ValueError(f"catalog: {id}: {field.name} is {value!r}; valid: a list of strings")
    if not isinstance(value, str):
        raise ValueError(f"catalog: {id}: {field.name} is {value!r}; valid: a string")
    return value.strip().replace("\n", " ")
