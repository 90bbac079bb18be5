"""Names for parts: how a config, a command line or `create` binds constructors by name.

A part is a Linen module, a dataclass or a plain function. `register` gives it a name under a kind at import time;
`build` turns a spec such as `{"name": "adamoe", "top_k": 4}` into the part with its fields bound, and `describe` turns
a part back into the full spec. A field that is named after a kind (`ffn`, or `mixers` for several) holds parts of that
kind, so specs nest the way the modules do.
"""

import dataclasses
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typeguard
from flax import linen as nn

from effjax.unknown import unknown

# The room where the parts of each kind register themselves; imported when the kind is first asked for.
ROOMS = {
    "depth": "effjax.depth",
    "embed": "effjax.nn",
    "ffn": "effjax.ffn",
    "head": "effjax.heads",
    "mixer": "effjax.mixers",
    "model": "effjax.models",
    "norm": "effjax.nn",
    "objective": "effjax.objectives",
    "routing": "effjax.depth",
    "schedule": "effjax.optim",
    "source": "effjax.data",
    "tokenizer": "effjax.data",
}

_PARTS: dict[str, dict[str, Any]] = {}
_NAMES: dict[Any, tuple[str, str]] = {}


class RegistryError(ValueError):
    """An unknown name or field, or a value of the wrong type; the message says what would be valid."""


def register[Part](kind: str, name: str) -> Callable[[Part], Part]:
    """Decorator: makes a class or function known as `name` among the parts of `kind`.

    Raises:
      RegistryError: for an unknown kind, or if another part already has that name.
    """

    if kind not in ROOMS:
        raise RegistryError(unknown("kind of part", kind, ROOMS))

    def add(part: Any) -> Any:
        parts = _PARTS.setdefault(kind, {})
        if name in parts and parts[name].__qualname__ != part.__qualname__:
            raise RegistryError(f"{kind} {name!r} is already registered as {parts[name]!r}")
        parts[name] = part
        _NAMES[part] = (kind, name)
        return part

    return add


def names(kind: str) -> list[str]:
    """Sorted names of the parts of one kind."""
    return sorted(_table(kind))


def lookup(kind: str, name: str) -> Any:
    """The class or function registered as `name`; an unknown name is an error that shows the nearest one."""
    table = _table(kind)
    if name not in table:
        raise RegistryError(unknown(kind, name, table))
    return table[name]


def fields(part: Any) -> dict[str, Any]:
    """Field names of a class or function (its keyword-only arguments) with their defaults.

    A field without a default maps to `dataclasses.MISSING`.
    """
    if dataclasses.is_dataclass(part):
        return {f.name: _default(f) for f in dataclasses.fields(part) if _is_own(f)}
    parameters = inspect.signature(part).parameters.values()
    return {
        p.name: dataclasses.MISSING if p.default is p.empty else p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }


def build(kind: str, spec: Mapping[str, Any] | str | Any) -> Any:
    """Binds the fields that a spec gives to the part it names.

    Args:
      kind: which kind of part.
      spec: `{"name": ..., field: value, ...}`, a bare name, or an already built part (returned as it is).

    Returns:
      An instance for a class, a `functools.partial` for a function.

    Raises:
      RegistryError: for an unknown name, an unknown or missing field, or a value of the wrong type.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        return spec
    given = dict(spec)
    if "name" not in given:
        raise RegistryError(
            f"{kind}: the spec {given!r} has no 'name'; valid: {', '.join(names(kind))}"
        )
    name = given.pop("name")
    part = lookup(kind, name)
    bound = bind(part, given, where=f"{kind} {name!r}")
    return part(**bound) if inspect.isclass(part) else functools.partial(part, **bound)


def bind(part: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks field names and types of `given` against `part` and builds the nested parts.

    Args:
      part: a class or function.
      given: field name to value; nested specs are built.
      where: how errors name the part.
    """
    known = fields(part)
    hints = typing.get_type_hints(part)
    bound = {}
    for field, value in given.items():
        if field not in known:
            raise RegistryError(f"{where}: {unknown('field', field, known)}")
        kind = kind_of(field)
        if kind and isinstance(value, (Mapping, str)):
            value = build(kind, value)
        elif kind and isinstance(value, (list, tuple)):
            value = tuple(build(kind, one) for one in value)
        elif isinstance(value, list):
            value = tuple(value)
        _check_type(value, hints.get(field, Any), f"{where}: field {field!r}")
        bound[field] = value
    missing = [f for f, d in known.items() if d is dataclasses.MISSING and f not in bound]
    if missing:
        raise RegistryError(f"{where}: missing field(s) {', '.join(map(repr, missing))}")
    return bound


def describe(part: Any) -> Any:
    """The full spec of a built part: its registered name and every field, nested parts included."""
    if isinstance(part, functools.partial):
        defaults = {k: v for k, v in fields(part.func).items() if v is not dataclasses.MISSING}
        return {"name": _NAMES[part.func][1], **describe_values(defaults | part.keywords)}
    if type(part) in _NAMES or isinstance(part, nn.Module):
        _, name = _NAMES.get(type(part), (None, type(part).__name__))
        return {"name": name, **describe_fields(part)}
    if isinstance(part, tuple):
        return tuple(describe(p) for p in part)
    return part


def describe_fields(part: Any) -> dict[str, Any]:
    """Every field of a dataclass or module instance, nested parts as specs."""
    return describe_values({name: getattr(part, name) for name in fields(part)})


def describe_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: describe(value) for name, value in values.items()}


def plain_fields(spec: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a spec that are no specs themselves, by dotted path: ("mixers.0.num_heads", 4)."""
    if isinstance(spec, Mapping):
        for name, value in spec.items():
            yield from plain_fields(value, f"{path}.{name}" if path else name)
    elif isinstance(spec, tuple) and any(isinstance(value, Mapping) for value in spec):
        for i, value in enumerate(spec):
            yield from plain_fields(value, f"{path}.{i}")
    else:
        yield path, spec


def merge(spec: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `spec` with `overrides` laid over it, recursively.

    Keys may be dotted (`"depth.num_recursions"`). Where an override names another part than the spec does, the fields
    of the old part are dropped with it. Field names are checked later, by `build`.
    """
    merged = dict(spec)
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        old = merged.get(head)
        if isinstance(value, str) and isinstance(old, Mapping):
            value = {"name": value}
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            renamed = "name" in value and value["name"] != old.get("name")
            merged[head] = merge({} if renamed else old, value)
        else:
            merged[head] = value
    return merged


def kind_of(field: str) -> str | None:
    """The kind of part that a field of this name holds, one or several; None if it holds a plain value."""
    for kind in (field, field.removesuffix("s")):
        if kind in ROOMS:
            return kind
    return None


def _table(kind: str) -> dict[str, Any]:
    if kind not in ROOMS:
        raise RegistryError(unknown("kind of part", kind, ROOMS))
    importlib.import_module(ROOMS[kind])
    return _PARTS[kind]


def _is_own(field: dataclasses.Field) -> bool:
    return field.init and field.name not in ("parent", "name")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_type(value: Any, annotation: Any, where: str) -> None:
    if isinstance(value, bool) and annotation in (int, float, int | None, float | None):
        raise RegistryError(f"{where} is {value!r}, a bool; valid: {_readable(annotation)}")
    try:
        typeguard.check_type(value, annotation)
    except typeguard.TypeCheckError as error:
        raise RegistryError(
            f"{where} is {value!r} ({type(value).__name__}); valid: {_readable(annotation)}"
        ) from error


def _readable(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, nn.Module):
        return f"a {annotation.__name__}"
    return getattr(annotation, "__name__", None) or str(annotation)
