"""What flags that set fields of a config (`--config.model.depth.name=recursive`) mean before they are set.

A flag that names another part than the config has gives the section the fields of that part, which further flags can
then set. A flag that says `none` of a field means None where that is valid, and else the word.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any

import ml_collections
from ml_collections.config_flags import config_path

from effjax import registry
from effjax.training import config as configs

NONE = ("none", "None")


def prepare(config: ml_collections.ConfigDict, overrides: Iterable[tuple[str, str | None]]) -> None:
    """Makes a config ready for its flags.

    Args:
      config: what a recipe gives, not locked.
      overrides: fields with what the flags say, ("model.depth.name", "recursive"); those that it does not have are left
        for the flags to refuse.

    Raises:
      ValueError: for a part of an unknown name.
    """
    overrides = sorted(overrides, key=lambda one: len(config_path.split(one[0])))
    for path, value in overrides:  # a part before the parts within it
        if path.endswith(".name") and value is not None and _has(config, path):
            _name_part(config, path.removesuffix(".name"), value)
    for path, value in overrides:
        if value in NONE and _has(config, path):
            _clear(config, path)


def _name_part(config: ml_collections.ConfigDict, path: str, name: str) -> None:
    """Replaces the fields of the part at a path by those of another, with its defaults."""
    section = config_path.get_value(path, config)
    if not isinstance(section, ml_collections.ConfigDict) or section.name == name:
        return
    try:
        fresh = _fresh(path, name)
    except ValueError as error:
        raise ValueError(f"config.{path}.name: {error}") from error
    if fresh is not None:
        for field in list(section):
            del section[field]
        section.update(fresh)


def _fresh(path: str, name: str) -> ml_collections.ConfigDict | None:
    """The section of a part with its defaults; None where there is no part."""
    if path == "model":
        return configs.model_config(name)
    if path == "optimizer":
        return configs.optimizer_config(name)
    kind = _kind(path)
    if kind is None:
        return None
    part = registry.lookup(kind, name)
    defaults = {
        field: None if value is dataclasses.MISSING else value
        for field, value in registry.fields(part).items()
    }
    return configs.editable(part, {"name": name, **registry.describe_values(defaults)})


def _clear(config: ml_collections.ConfigDict, path: str) -> None:
    """Sets a field that may be None to that, so that its flag takes `none` for it."""
    *owner, field = config_path.split(path)
    holder: Any = config
    for key in owner:
        holder = holder[key]
    if isinstance(holder, ml_collections.ConfigDict) and (
        holder[field] is None or _is_optional(path, holder, field)
    ):
        del holder[field]  # with its type, if it has one
        holder[field] = None


def _is_optional(path: str, section: ml_collections.ConfigDict, field: str) -> bool:
    """Whether the part that a section describes takes None for a field."""
    owner = path.rpartition(".")[0]
    kind = "model" if owner == "model" else _kind(owner)
    if kind is None or "name" not in section:
        return False
    part = registry.lookup(kind, section.name)
    part = type(part()) if kind == "model" else part  # a preset is a function that makes a model
    return types.NoneType in typing.get_args(typing.get_type_hints(part).get(field))


def _kind(path: str) -> str | None:
    """The kind of part that a section holds: "mixer" for `model.mixers[0]`."""
    names = [key for key in config_path.split(path) if isinstance(key, str)] if path else []
    return registry.kind_of(names[-1]) if names else None


def _has(config: ml_collections.ConfigDict, path: str) -> bool:
    try:
        config_path.get_value(path, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    return True
