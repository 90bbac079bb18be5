"""optax optimizers bound from a config: clipping, a schedule, decay on matrices only.

Leaves named `balance_bias` are left out of all that: the gradient of their loss term *is* their update direction
(`effjax.routing.balance`), so they take plain gradient steps at a rate of their own.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import optax

from effjax import pytree, registry

_NAMES = ("adabelief", "adafactor", "adam", "adamw", "lamb", "lion", "nadamw", "sgd")

# Vectors that scale or shift features; decaying them pulls towards a wrong point.
_NOT_DECAYED = r"scale|bias|balance_bias"

_HOUSE_FIELDS = {
    "schedule": {"name": "warmup_cosine"},
    "clip_norm": 1.0,
    "balance_rate": 1e-3,
}


def names() -> list[str]:
    """The optax optimizers that a config can name."""
    return sorted(_NAMES)


def spec(name: str = "adamw", **overrides: Any) -> dict[str, Any]:
    """Every field of an optimizer: `schedule`, `clip_norm` (None for none), `balance_rate`, and optax's own numbers.

    Raises:
      RegistryError: for an unknown optimizer or field.
    """
    known = _fields(name)
    for field in overrides:
        if field.split(".")[0] not in known:
            raise registry.RegistryError(
                f"optimizer {name!r}: {registry.unknown('field', field, known)}"
            )
    merged = registry.merge(known, overrides)
    schedule = registry.build("schedule", merged["schedule"])
    return {"name": name} | merged | {"schedule": registry.describe(schedule)}


def build(
    config: Mapping[str, Any], num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config (as `spec` returns it), and its schedule for the logs.

    Raises:
      RegistryError: for an unknown optimizer, schedule or field.
    """
    given = dict(config)
    name = given.pop("name", "adamw")
    given = spec(name, **given)
    del given["name"]
    schedule = registry.build("schedule", given.pop("schedule"))(num_steps)
    clip_norm, balance_rate = given.pop("clip_norm"), given.pop("balance_rate")
    optimizer = getattr(optax, name)(learning_rate=schedule, **given, **_decay_mask(name))
    if clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    partitioned = optax.partition(
        {"weights": optimizer, "balance": optax.sgd(balance_rate)},
        lambda params: pytree.map_paths(_group, params),
    )
    return partitioned, schedule


def _group(path: str, leaf: Any) -> str:
    return "balance" if pytree.matches("balance_bias", path) else "weights"


def _fields(name: str) -> dict[str, Any]:
    if name not in _NAMES:
        raise registry.RegistryError(registry.unknown("optimizer", name, _NAMES))
    parameters = inspect.signature(getattr(optax, name)).parameters.values()
    numbers = {
        p.name: p.default
        for p in parameters
        if isinstance(p.default, int | float) or p.name in ("momentum", "weight_decay_rate")
    }
    return _HOUSE_FIELDS | numbers


def _decay_mask(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(optax, name)).parameters
    mask = next((p for p in ("mask", "weight_decay_mask") if p in parameters), None)
    if mask is None:
        return {}
    decays = lambda path, leaf: not pytree.matches(_NOT_DECAYED, path)  # noqa: E731
    return {mask: lambda params: pytree.map_paths(decays, params)}
