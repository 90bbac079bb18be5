"""Text by continuous depth-wise batching: rows are at recursions of their own, and take the next text at their end."""

import collections
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from effjax.models import SequenceModel
from effjax.serving import depthwise
from effjax.serving.depthwise import Programs
from effjax.serving.generation import Generation
from effjax.serving.inputs import NO_TOKEN, Inputs
from effjax.serving.prompts import TokenIds, bucket
from effjax.serving.sampling import PLAIN, Sampling

# Free slots wait for each other, up to this part of a batch: prompts that are read together take less time, and slots
# without a text waste theirs.
REFILL = 8


@dataclasses.dataclass(frozen=True)
class DepthwiseGeneration(Generation):
    """What came after each prompt, and what it took.

    Attributes:
      steps: applications of the shared blocks to the batch, prompts not counted.
      applications: recursions that tokens took in them.
      num_slots: rows of the batch.
    """

    steps: int
    applications: int
    num_slots: int

    @property
    def reads(self) -> int:
        """Tokens that were read: all that were drawn but the last of each text."""
        return int(np.sum(self.lengths - 1))

    @property
    def mean_depth(self) -> float:
        """Recursions a token."""
        return self.applications / self.reads if self.reads else 0.0

    @property
    def occupancy(self) -> float:
        """Share of the rows of a step that had a token on its way."""
        return self.applications / (self.steps * self.num_slots) if self.steps else 0.0


def generate_depthwise(
    model: SequenceModel,
    variables: Any,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    *,
    num_slots: int = 32,
    sampling: Sampling = PLAIN,
    stop_tokens: Collection[int] = (),
    key: Key[Array, "..."] | None = None,
) -> DepthwiseGeneration:
    """The texts of `generate`, in time proportional to the recursions that their tokens take.

    There may be more texts than slots: when an eighth of the slots is free, the next ones begin in them. Programs are
    compiled for a model, a number of slots, and numbers of prompts and lengths up to the next power of two.

    Args:
      model: a model whose depth policy is `recursive` or `mixture_of_recursions`, as for `generate` otherwise.
      variables: its variables.
      prompts: token ids of each prompt, at least one.
      max_new_tokens: most tokens that a text gets.
      num_slots: texts at a time.
      sampling: how tokens are drawn.
      stop_tokens: ids that end a text.
      key: text i draws by this key folded with i; or a key for each, [B]. None is `jax.random.key(0)`.

    Raises:
      ValueError: as for `generate`, for a depth policy without recursions, or `num_slots` below 1.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots}; valid: at least 1")
    inputs = Inputs.of([model], prompts, max_new_tokens, sampling, stop_tokens, key)
    loop = _Loop(depthwise.programs(model), variables, inputs, num_slots, max_new_tokens)
    waiting = collections.deque(range(len(inputs.lengths)))
    while waiting or loop.num_texts:
        if waiting:
            # A power of two, so that there are few programs.
            count = 1 << (min(num_slots - loop.num_texts, len(waiting)).bit_length() - 1)
            loop.admit([waiting.popleft() for _ in range(count)])
        loop.run(min(max(1, num_slots // REFILL), len(waiting)) if waiting else num_slots)
    return loop.generation(stop_tokens)


class _Loop:
    """The texts in the slots, and what has become of those that were."""

    def __init__(
        self,
        programs: Programs,
        variables: Any,
        inputs: Inputs,
        num_slots: int,
        max_new_tokens: int,
    ):
        self._programs, self._variables, self._inputs = programs, variables, inputs
        self._limit = max_new_tokens
        self._batch = programs.empty(
            variables,
            num_rows=num_slots,
            max_length=inputs.max_length,
            max_new_tokens=bucket(max_new_tokens),
            with_penalty="repetition_penalty" in inputs.settings,
        )
        self._texts: list[int | None] = [None] * num_slots
        self._done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._steps = self._applications = 0

    @property
    def num_texts(self) -> int:
        """Texts that are in a slot."""
        return sum(text is not None for text in self._texts)

    def admit(self, texts: list[int]) -> None:
        """Gives free slots to texts, whose prompts are read together."""
        slots = [slot for slot, text in enumerate(self._texts) if text is None][: len(texts)]
        for slot, text in zip(slots, texts, strict=True):
            self._texts[slot] = text
        inputs, chosen = self._inputs, np.array(texts)
        lengths = inputs.lengths[chosen]
        self._batch = self._programs.admit(
            self._variables,
            self._batch,
            np.array(slots, np.int32),
            # A short prompt does not pay for a long one that is not read with it.
            inputs.prompts[chosen, : bucket(int(lengths.max()))],
            lengths,
            inputs.keys[chosen],
            np.full(len(texts), self._limit, np.int32),
            inputs.settings,
            inputs.stop_tokens,
        )

    def run(self, num_free: int) -> None:
        """Goes on until so many slots are free."""
        self._batch, steps, applications = self._programs.run(
            self._variables,
            self._batch,
            np.ones(len(self._texts), bool),
            self._inputs.settings,
            self._inputs.stop_tokens,
            np.int32(num_free),
            np.int32(np.iinfo(np.int32).max),
        )
        rows = self._batch.rows
        steps, applications, stopped, counts, tokens, logprobs = jax.device_get(
            (
                steps,
                applications,
                rows.stopped,
                rows.count,
                self._batch.tokens,
                self._batch.logprobs,
            )
        )
        self._steps += int(steps)
        self._applications += int(applications)
        for slot, text in enumerate(self._texts):
            if text is not None and stopped[slot]:
                count = counts[slot]
                self._done[text] = tokens[slot, :count], logprobs[slot, :count]
                self._texts[slot] = None

    def generation(self, stop_tokens: Collection[int]) -> DepthwiseGeneration:
        """All texts, in the order of their prompts."""
        shape = (len(self._done), self._limit)
        tokens, logprobs = np.full(shape, NO_TOKEN, np.int32), np.zeros(shape, np.float32)
        lengths = np.zeros(len(self._done), np.int32)
        for text, (drawn, scores) in self._done.items():
            lengths[text] = len(drawn)
            tokens[text, : len(drawn)] = drawn
            logprobs[text, : len(drawn)] = scores
        last = tokens[np.arange(len(lengths)), lengths - 1]
        return DepthwiseGeneration(
            tokens=tokens,
            logprobs=logprobs,
            lengths=lengths,
            stopped=np.isin(last, sorted(stop_tokens)),
            steps=self._steps,
            applications=self._applications,
            num_slots=len(self._texts),
        )
