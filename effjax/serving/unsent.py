"""Which of the tokens that a batch keeps in arrays are new since they were last looked at."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.serving.decoder import Drawn, by_slot


class Unsent:
    """How many tokens of the text in each slot have been handed out."""

    def __init__(self, num_slots: int):
        self._sent = np.zeros(num_slots, np.int32)

    def begin(self, slots: Sequence[int]) -> None:
        """Other texts are in these slots now."""
        self._sent[slots] = 0

    def take(
        self,
        tokens: Int[Array, "B N"],
        logprobs: Float[Array, "B N"],
        counts: Int[Array, " B"],
        most: int,
    ) -> Mapping[int, Sequence[Drawn]]:
        """The new tokens of each slot.

        Args:
          tokens, logprobs: what was drawn in each row.
          counts: how many tokens that is.
          most: new tokens that a row can have.
        """
        found = _behind(tokens, logprobs, counts, self._sent, size=most)
        new_tokens, new_logprobs, drawn = jax.device_get(found)
        num_new = drawn - self._sent
        self._sent = drawn.copy()  # what comes from a device is read-only
        return by_slot(range(len(drawn)), new_tokens, new_logprobs, num_new)


@functools.partial(jax.jit, static_argnames="size")
def _behind(tokens, logprobs, counts, sent, *, size):
    """`size` tokens of each row behind those that were sent, so that only these leave the device."""
    place = sent[:, None] + jnp.arange(size)
    take = lambda array: jnp.take_along_axis(array, place, axis=1, mode="clip")  # noqa: E731
    return take(tokens), take(logprobs), counts
