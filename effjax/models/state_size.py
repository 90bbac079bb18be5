"""How much a model has to remember while it decodes: the horizontal axis of recall-against-memory curves."""

import dataclasses

import jax
import jax.numpy as jnp

from effjax import registry
from effjax.models.sequence_model import SequenceModel


@dataclasses.dataclass(frozen=True)
class StateSize:
    """Decode state of one sequence.

    Attributes:
      part: registered name of the mixer; "total" for the sum of all layers.
      numbers: floating-point numbers (keys and values, sums, convolution inputs).
      bytes: of all arrays, bookkeeping of positions and segments included.
    """

    part: str
    numbers: int
    bytes: int


def state_size(model: SequenceModel, max_length: int) -> list[StateSize]:
    """State of each layer of the stack and, last, of all of them, for one sequence of up to `max_length` tokens.

    Nothing is allocated. Arora et al., 2024, arXiv 2402.18668, section 3 count the same way, without the bytes.

    Raises:
      ValueError: if `max_length` is not between 1 and the model's `max_seq_len`.
    """
    if not 1 <= max_length <= model.max_seq_len:
        raise ValueError(f"max_length is {max_length}; valid: 1 to max_seq_len={model.max_seq_len}")
    stack = model.stack()
    empty = lambda: stack.init_state(1, max_length, model.d_model, model.dtype)  # noqa: E731
    layers = [
        _measure(registry.describe(block.mixer)["name"], state)
        for block, state in zip(stack.blocks, jax.eval_shape(empty), strict=True)
    ]
    total = StateSize("total", sum(s.numbers for s in layers), sum(s.bytes for s in layers))
    return [*layers, total]


def _measure(part: str, state) -> StateSize:
    leaves = jax.tree.leaves(state)
    return StateSize(
        part,
        numbers=sum(a.size for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)),
        bytes=sum(a.size * a.dtype.itemsize for a in leaves),
    )
