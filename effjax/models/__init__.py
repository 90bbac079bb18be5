"""The zoo: whole models by name.

A preset is a function that returns a model composed of parts; `create` lays overrides over it and binds it again.
"""

from typing import Any

from effjax import registry
from effjax.models import (  # noqa: F401 (presets)
    based,
    mamba,
    matryoshka,
    mixture_of_experts,
    mor,
    presets,
)
from effjax.models.sequence_model import (
    DecoderLM,
    DecodeState,
    Output,
    SequenceModel,
    TextEncoder,
)
from effjax.models.state_size import StateSize, state_size
from effjax.models.uptraining import uptrain

__all__ = [
    "DecodeState",
    "DecoderLM",
    "Output",
    "SequenceModel",
    "StateSize",
    "TextEncoder",
    "create",
    "names",
    "spec",
    "state_size",
    "uptrain",
]


def names() -> list[str]:
    """The models that `create` knows."""
    return registry.names("model")


def spec(name: str, **overrides: Any) -> dict[str, Any]:
    """Every field of a model as a nested dict, `{"name": name, ...}`: what a config holds and `create` binds.

    Overrides are as for `create`, and checked as there.
    """
    return {"name": name} | registry.describe_fields(create(name, **overrides))


def create(name: str, **overrides: Any) -> SequenceModel:
    """The model of that name with some fields changed.

    Args:
      name: one of `names()`.
      **overrides: fields of the model. A part is given as a module, as the fields to change
        (`depth={"num_recursions": 3}`), as another part (`ffn={"name": "adamoe", "top_k": 4}`, or `ffn="adamoe"` with
        its defaults), or by a dotted key (`**{"depth.num_recursions": 3}`).

    Raises:
      RegistryError: for an unknown name, an unknown field or a value of the wrong type.
    """
    preset = registry.lookup("model", name)()
    fields = registry.merge(registry.describe_fields(preset), overrides)
    return type(preset)(**registry.bind(type(preset), fields, where=f"model {name!r}"))
