"""What is asked of a decoder, and the requests that have its slots, as arrays that compiled programs take."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from effjax.serving.prompts import bucket, pad
from effjax.serving.sampling import PLAIN, Sampling, Settings

# A value of each setting that changes nothing, for rows that do not use what another row of the batch uses.
_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}

# Settings that a step is compiled for: filters sort the vocabulary, which most batches can do without.
_PROGRAMS = ((), ("temperature",), ("min_p", "repetition_penalty", "temperature", "top_k", "top_p"))

# Ways to draw that take one of these programs each.
USUAL = (Sampling(temperature=0.0), PLAIN, Sampling(top_p=0.9))


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to be continued.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: most tokens that are drawn.
      sampling: how they are drawn.
      stop_tokens: ids that end the text.
      seed: of the draws. A text depends on its prompt, sampling and seed, and not on the others in the batch.
    """

    prompt: Int[np.ndarray, " n"]
    max_new_tokens: int
    sampling: Sampling = PLAIN
    stop_tokens: frozenset[int] = frozenset()
    seed: int = 0


class Prompts(NamedTuple):
    """Requests that are read together, as arrays.

    Attributes:
      tokens: [K, T] token ids, padding behind them.
      lengths: [K] tokens of each prompt.
      keys: [K] random keys.
      limits: [K] most tokens that each text gets.
      settings: how tokens are drawn, an array [K] each.
    """

    tokens: Int[np.ndarray, "K T"]
    lengths: Int[np.ndarray, " K"]
    keys: Key[Array, " K"]
    limits: Int[np.ndarray, " K"]
    settings: Settings


class Requests:
    """The requests in the slots of a batch: those whose prompts are not read yet, and those that are decoded.

    Attributes:
      is_read: [B] slots whose prompts were read.
    """

    def __init__(self, num_slots: int, vocab_size: int):
        self.is_read: Bool[np.ndarray, " B"] = np.zeros(num_slots, bool)
        self._requests: dict[int, Request] = {}
        self._unread: collections.deque[int] = collections.deque()
        self._neutral = {**_NEUTRAL, "top_k": float(vocab_size)}

    def put(self, slot: int, request: Request) -> None:
        """Gives a free slot to a request."""
        self._requests[slot] = request
        self._unread.append(slot)

    def remove(self, slot: int) -> None:
        """Frees a slot."""
        self._requests.pop(slot, None)
        self.is_read[slot] = False
        if slot in self._unread:
            self._unread.remove(slot)

    def to_read(self, together: int) -> list[int]:
        """Slots whose prompts are read next, which then count as read: so many, or one; none if all are read.

        Of no other number, so that there are few programs; and of one bucket, so that no prompt pays for the length of
        another.
        """
        slots = list(self._unread)[:together]
        buckets = {bucket(len(self._requests[slot].prompt)) for slot in slots}
        if len(slots) < together or len(buckets) > 1:
            slots = slots[:1]
        for slot in slots:
            self._unread.remove(slot)
            self.is_read[slot] = True
        return slots

    def prompts(self, slots: Sequence[int], max_length: int) -> Prompts:
        """The requests of some slots; prompts are padded, so that there are few programs."""
        requests = [self._requests[slot] for slot in slots]
        return Prompts(
            *pad([request.prompt for request in requests], max_length),
            jnp.stack([jax.random.key(request.seed) for request in requests]),
            np.array([request.max_new_tokens for request in requests], np.int32),
            self._settings([request.sampling for request in requests], _PROGRAMS[-1]),
        )

    def settings(self) -> Settings:
        """How tokens of the texts that are decoded are drawn: those settings that one of them uses, [B] each."""
        samplings = [
            self._requests[slot].sampling if is_read else None
            for slot, is_read in enumerate(self.is_read)
        ]
        used = {name for s in samplings if s is not None for name in s.settings()}
        names = next(names for names in _PROGRAMS if used <= set(names))
        return self._settings(samplings, names)

    def _settings(self, samplings: Sequence[Sampling | None], names: Iterable[str]) -> Settings:
        given = [{} if sampling is None else sampling.settings() for sampling in samplings]
        return {
            name: np.array([row.get(name, self._neutral[name]) for row in given], np.float32)
            for name in names
        }
