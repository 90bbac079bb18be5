"""A decoder over slots: what the engine of a server asks of a way to decode.

Continuous batching (Yu et al., 2022, "Orca", OSDI): a batch has a fixed number of slots, so that the same compiled
programs serve whatever texts are in them, and where one text has ended, another takes its place while the others go on.
"""

import abc
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from effjax.models import SequenceModel
from effjax.serving.prompts import bucket
from effjax.serving.requests import USUAL, Request, Requests
from effjax.serving.sampling import Sampling

# Prompts are read together up to this part of a batch: their states take memory beside those of the batch.
_SHARE = 4


class Drawn(NamedTuple):
    """A token that was drawn.

    Attributes:
      id: the token.
      logprob: its log-probability (natural) under the model, before temperature and filters.
    """

    id: int
    logprob: float


@dataclasses.dataclass(frozen=True)
class Total:
    """Something that a decoder counts.

    Attributes:
      name: a word or several, joined by underscores.
      text: what it is.
      count: since the beginning.
    """

    name: str
    text: str
    count: int


class Decoder(abc.ABC):
    """Texts in the making, each in a slot of a batch.

    A text is what it would be alone, which is that of `generate` where a subclass does not say otherwise. A subclass
    keeps the batch: `reset` begins one without texts, `_read` puts prompts into it, and `_step` takes its texts on.

    Attributes:
      num_slots: texts at a time.
      max_length: tokens of a text, prompt included.
      vocab_size: number of token ids.
    """

    def __init__(
        self,
        models: Sequence[SequenceModel],
        num_slots: int,
        max_length: int | None,
        together: int,
    ):
        """Compiles nothing yet.

        Args:
          models: those that read the texts, of one vocabulary.
          num_slots: texts at a time.
          max_length: room of a text, prompt included; None: the smallest `max_seq_len` of the models.
          together: prompts that are read together, if there are as many.

        Raises:
          ValueError: for a number that is not valid.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots}; valid: at least 1")
        longest = min(model.max_seq_len for model in models)
        self.max_length = longest if max_length is None else max_length
        if not 1 <= self.max_length <= longest:
            raise ValueError(f"max_length={max_length}; valid: 1 to max_seq_len={longest}")
        self.num_slots = num_slots
        self.vocab_size = models[0].vocab_size
        self._requests = Requests(num_slots, self.vocab_size)
        self._together = together
        # What a subclass counts of what it does, if it does (`totals`).
        self._counts = np.zeros(2, int)

    @property
    def room(self) -> int:
        """Most tokens that a text can ever have, prompt included."""
        return self.max_length

    @property
    def free_cache_tokens(self) -> int | None:
        """Room in the memory that texts share; None if they do not."""
        return None

    @property
    def totals(self) -> Sequence[Total]:
        """What this way to decode is judged by."""
        return ()

    def admit(self, slot: int, request: Request) -> bool:
        """Gives a free slot to a request of up to `room` tokens.

        Returns:
          False, and nothing has happened, if there is no memory for it until others have ended.
        """
        self._requests.put(slot, request)
        return True

    def advance(self) -> Mapping[int, Sequence[Drawn]]:
        """Reads prompts and draws their first tokens; if all prompts are read, draws further tokens of every text.

        Returns:
          New tokens of slots, at least one if a slot is taken; never more of a text than its `max_new_tokens`. That one
          of them ends the text is for the caller to see, who then releases the slot; until then the text goes on.
        """
        slots = self._requests.to_read(self._together)
        return self._read(slots) if slots else self._step()

    def release(self, slot: int) -> None:
        """Frees the slot of a text that has ended, or that nobody waits for."""
        self._requests.remove(slot)

    def warm_up(self, longest: int) -> None:
        """Compiles what texts need whose prompts have up to so many tokens, by making some; all slots have to be free.

        Args:
          longest: tokens of a prompt; there is a program for each power of two, from 16 on.
        """
        lengths, longest = [0], min(longest, self.room - 2)
        while lengths[-1] < longest:
            lengths.append(min(bucket(lengths[-1] + 1), longest))
        for length, group in itertools.product(lengths[1:], sorted({1, self._together})):
            self._try(length, group, USUAL[0])
        for sampling in USUAL[1:] if longest > 0 else ():
            self._try(1, 1, sampling)
        self._counts[:] = 0

    def _try(self, length: int, group: int, sampling: Sampling) -> None:
        """Two tokens of the texts of equal prompts, which are not kept."""
        prompt = np.zeros(length, np.int32)
        slots = [s for s in range(group) if self.admit(s, Request(prompt, 2, sampling))]
        for _ in range(2):  # reads the prompts, and takes a step
            self.advance()
        for slot in slots:
            self.release(slot)

    @abc.abstractmethod
    def reset(self) -> None:
        """Begins anew after a call has failed, which may have lost the texts. All slots have to be free."""

    @abc.abstractmethod
    def _read(self, slots: Sequence[int]) -> Mapping[int, Sequence[Drawn]]:
        """Reads the prompts of some slots; returns the first token of each."""

    @abc.abstractmethod
    def _step(self) -> Mapping[int, Sequence[Drawn]]:
        """Takes all texts on; returns their new tokens."""


def read_together(num_slots: int) -> int:
    """How many prompts are read together, which takes less time than to read them one by one."""
    return max(1, num_slots // _SHARE)


def by_slot(
    slots: Sequence[int],
    tokens: Int[np.ndarray, "K N"],
    logprobs: Float[np.ndarray, "K N"],
    counts: Int[np.ndarray, " K"],
) -> dict[int, list[Drawn]]:
    """What was drawn in some slots, from the first so many tokens of each; those without any are left out."""
    rows = zip(slots, tokens.tolist(), logprobs.tolist(), counts.tolist(), strict=True)
    return {
        slot: list(map(Drawn, tokens[:count], logprobs[:count]))
        for slot, tokens, logprobs, count in rows
        if count
    }
