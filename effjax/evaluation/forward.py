"""The forward pass of a model as one compiled program, for whatever wants to look at it or time it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

INPUTS = ("tokens", "positions", "segment_ids")


def compile_forward(model: nn.Module, variables: Any, inputs: Mapping[str, Array]) -> Any:
    """Compiles `(variables, inputs) -> (logits or embeddings, metrics)`.

    It leaves out what nobody looks at, such as hidden states, so that the compiler need not keep
    them.

    Args:
      model: the model.
      variables: its variables, where they live.
      inputs: `tokens` int32 [B, T], and what else `apply` takes by name; the compiled program takes
        inputs of these shapes only.
    """

    def forward(variables, inputs):
        output: Any = model.apply(variables, **inputs)
        return (output.embeddings if output.logits is None else output.logits), output.metrics

    return jax.jit(forward).lower(variables, inputs).compile()


def inputs_of(batch: Mapping[str, Array]) -> dict[str, Array]:
    """What a model takes from a batch: its text, or the documents of a batch of pairs."""
    if "tokens" in batch:
        return {name: batch[name] for name in INPUTS if name in batch}
    return {name: batch[f"document_{name}"] for name in ("tokens", "segment_ids")}
