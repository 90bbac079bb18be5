"""A decode state of constant size, and how it goes from one segment of a row to the next."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from effjax.mixers.kv_state import newest_segment


@flax.struct.dataclass
class RecurrentState:
    """What a recurrence remembers: the same size after one token and after a million.

    Attributes:
      memory: pytree of arrays [B, ...], zeros where nothing was seen.
      segment_ids: [B] the segment it is of; 0 before the first token.
    """

    memory: Any
    segment_ids: Int[Array, " B"]

    @classmethod
    def of(cls, memory: Any) -> "RecurrentState":
        """A state before the first token, with that memory."""
        batch_size = jax.tree.leaves(memory)[0].shape[0]
        return cls(memory, jnp.zeros((batch_size,), jnp.int32))

    def before(self, segment_ids: Int[Array, "B T"]) -> Any:
        """The memory that the tokens to come begin with: emptied where the first of them is of another segment."""
        index = jnp.argmax(segment_ids > 0, axis=1)[:, None]
        upcoming = jnp.take_along_axis(segment_ids, index, axis=1)[:, 0]
        continues = (upcoming == self.segment_ids) | (upcoming == 0)
        return keep(continues, self.memory, jax.tree.map(jnp.zeros_like, self.memory))

    def after(self, memory: Any, segment_ids: Int[Array, "B T"]) -> "RecurrentState":
        """The state with the memory that those tokens left behind."""
        last = newest_segment(segment_ids)
        return RecurrentState(memory, jnp.where(last > 0, last, self.segment_ids))


def advance(
    state: RecurrentState | None,
    segment_ids: Int[Array, "B T"],
    step: Callable[[Any], tuple[Array, Any]],
    scan: Callable[[Any], tuple[Array, Any]],
) -> tuple[Array, RecurrentState]:
    """A recurrence over the tokens of a call: one at a time in decoding, else all in parallel.

    Args:
      state: the state before them; None before the first token.
      segment_ids: of the tokens.
      step: `memory -> (y, memory)` of the one token.
      scan: `memory or None -> (y, memory)` of all of them.

    Returns:
      What `step` or `scan` gave, and the state after the tokens.
    """
    before = None if state is None else state.before(segment_ids)
    if before is None or segment_ids.shape[1] > 1:
        y, memory = scan(before)
    else:
        y, memory = step(before)
        memory = keep(segment_ids[:, 0] > 0, memory, before)  # a padding token leaves no trace
    earlier = RecurrentState.of(memory) if state is None else state
    return y, earlier.after(memory, segment_ids)


def keep(rows: Array, chosen: Any, other: Any) -> Any:
    """Leaves [B, ...] of `chosen` in the rows where the condition [B] holds, of `other` elsewhere."""
    pick = lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, chosen, other)
