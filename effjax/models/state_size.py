"""How much a model has to remember while it decodes: the horizontal axis of recall-against-memory curves."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax import registry
from effjax.models.sequence_model import SequenceModel


@dataclasses.dataclass(frozen=True)
class StateSize:
    """Decode state of one sequence.

    Attributes:
      part: registered name of the mixer; "total" for the whole model.
      numbers: floating-point numbers (keys and values, sums, convolution inputs).
      bytes: of all arrays, bookkeeping of positions and segments included.
    """

    part: str
    numbers: int
    bytes: int


def state_size(model: SequenceModel, max_length: int) -> list[StateSize]:
    """State of each layer of the stack and, last, of the model, for one sequence of up to `max_length` tokens.

    The model's is what its depth policy keeps: less than the sum of the layers where these share keys and values.
    Nothing is allocated. Arora et al., 2024, arXiv 2402.18668, section 3 count the same way, without the bytes.

    Raises:
      ValueError: if `max_length` is not between 1 and the model's `max_seq_len`.
    """
    if not 1 <= max_length <= model.max_seq_len:
        raise ValueError(f"max_length is {max_length}; valid: 1 to max_seq_len={model.max_seq_len}")
    stack = model.stack()
    size = (1, max_length, model.d_model, model.dtype)
    layers = [
        _measure(
            registry.describe(block.mixer)["name"], functools.partial(block.mixer.init_state, *size)
        )
        for block in stack.blocks
    ]
    return [*layers, _measure("total", lambda: model.depth.init_state(stack, *size))]


def _measure(part: str, empty: Callable[[], Any]) -> StateSize:
    leaves = jax.tree.leaves(jax.eval_shape(empty))
    return StateSize(
        part,
        numbers=sum(a.size for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)),
        bytes=sum(a.size * a.dtype.itemsize for a in leaves),
    )
