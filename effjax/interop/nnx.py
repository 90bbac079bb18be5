"""Linen models in NNX programs, through Flax's own bridge."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx


def to_nnx(
    model: nn.Module, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None
) -> nnx.bridge.ToNNX:
    """A model with its parameters as an NNX module, which is called as the model is.

    Args:
      model: any model of this library.
      variables: its `{"params": ...}`.
      rngs: for calls with `train=True`, which ask for the stream "routing".

    Returns:
      A module whose `nnx.Param`s are the parameters, to be transformed, optimised and saved as any other's.
    """
    module = nnx.bridge.ToNNX(_Whole(model), rngs=rngs)
    params = jax.tree.map(nnx.Param, dict(variables["params"]))
    module.model = nnx.data(params)  # type: ignore[attr-defined] # the bridge has what is set, under any name
    return module


def from_nnx(module: nnx.bridge.ToNNX) -> dict[str, Any]:
    """The variables, for the Linen model, of what `to_nnx` returned."""
    return {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))["model"]}


class _Whole(nn.Module):
    """A model under one name: the bridge takes parameters for methods where they are called as fields of the model."""

    model: nn.Module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.model(*arguments, **options)
