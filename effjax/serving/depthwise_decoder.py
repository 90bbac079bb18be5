"""The decoder for Mixture-of-Recursions: no text waits for the recursions that the token of another takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax.models import SequenceModel
from effjax.serving import depthwise
from effjax.serving.decoder import Decoder, Drawn, Total, read_together
from effjax.serving.inputs import NO_STOPS
from effjax.serving.unsent import Unsent


class DepthwiseDecoder(Decoder):
    """Texts by the programs of `effjax.serving.generate_depthwise`.

    A step is as many applications of the shared blocks as there are recursions: what a token takes at most, and a step
    of the plain decoder costs as soon as one token of the batch takes it. Tokens that take fewer come sooner.
    """

    def __init__(
        self,
        model: SequenceModel,
        variables: Any,
        *,
        num_slots: int = 8,
        max_length: int | None = None,
    ):
        """Makes room for the texts.

        Args:
          model: a model whose depth policy is `recursive` or `mixture_of_recursions`, as for `generate` otherwise.
          variables: its variables.
          num_slots: texts at a time.
          max_length: room of a text, prompt included; None: the model's `max_seq_len`.

        Raises:
          ValueError: for a number that is not valid, or a depth policy without recursions.
        """
        super().__init__((model,), num_slots, max_length, read_together(num_slots))
        self._model, self._variables = model, variables
        self._programs = depthwise.programs(model)
        self.reset()

    @property
    def totals(self) -> Sequence[Total]:
        """Recursions that tokens took, and these tokens: the one over the other is the mean depth."""
        recursions, tokens = self._counts.tolist()
        return (
            Total("recursions", "Recursions of decoded tokens.", recursions),
            Total("recursion_tokens", "Decoded tokens whose recursions these are.", tokens),
        )

    def reset(self) -> None:
        """As `Decoder.reset`."""
        self._batch = self._programs.empty(
            self._variables,
            num_rows=self.num_slots,
            max_length=self.max_length,
            max_new_tokens=self.max_length,
            with_penalty=True,
        )
        self._unsent = Unsent(self.num_slots)

    def _read(self, slots: Sequence[int]) -> Mapping[int, Sequence[Drawn]]:
        prompts = self._requests.prompts(slots, self.max_length)
        rows = np.array(slots, np.int32)
        self._batch = self._programs.admit(self._variables, self._batch, rows, *prompts, NO_STOPS)
        self._unsent.begin(slots)
        return self._take(most=1)

    def _step(self) -> Mapping[int, Sequence[Drawn]]:
        most = self._model.depth.num_recursions
        self._batch, _, recursions = self._programs.run(
            self._variables,
            self._batch,
            self._requests.is_read,
            self._requests.settings(),
            NO_STOPS,
            np.int32(self.num_slots),
            np.int32(most),
        )
        drawn = self._take(most)
        self._counts += int(recursions), sum(map(len, drawn.values()))
        return drawn

    def _take(self, most: int) -> Mapping[int, Sequence[Drawn]]:
        batch = self._batch
        return self._unsent.take(batch.tokens, batch.logprobs, batch.rows.count, most)
