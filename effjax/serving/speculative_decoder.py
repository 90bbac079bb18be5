"""The decoder with a draft: each step judges a few drafted tokens of every text in one pass of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.models import SequenceModel
from effjax.serving import speculative
from effjax.serving.decoder import Decoder, Drawn, Total, read_together
from effjax.serving.inputs import NO_STOPS
from effjax.serving.unsent import Unsent


class SpeculativeDecoder(Decoder):
    """Texts by the programs of `effjax.serving.speculate`, whatever the draft distributed as the model says.

    Greedy texts are those of `generate`. Sampled ones are other draws than its own: those of `speculate` by the same
    key, if the limit of the text leaves room for whole drafts.
    """

    def __init__(
        self,
        model: SequenceModel,
        variables: Any,
        draft: SequenceModel,
        draft_variables: Any,
        *,
        num_draft_tokens: int = 4,
        num_slots: int = 8,
        max_length: int | None = None,
    ):
        """Makes room for the texts.

        Args:
          model: the target, as for `generate`.
          variables: its variables.
          draft: any model of the same vocabulary; see also `early_exit`.
          draft_variables: its variables.
          num_draft_tokens: tokens that are drafted before each pass of the target.
          num_slots: texts at a time.
          max_length: room of a text, prompt included; None: the smaller `max_seq_len` of the models.

        Raises:
          ValueError: for a number that is not valid, models of different vocabularies, or one that cannot generate.
        """
        super().__init__((model, draft), num_slots, max_length, read_together(num_slots))
        self._variables = (variables, draft_variables)
        self._programs = speculative.programs(model, draft, num_draft_tokens)
        self._num_draft_tokens = num_draft_tokens
        self.reset()

    @property
    def totals(self) -> Sequence[Total]:
        """Tokens of the draft, and those that stayed: the one over the other says how good the draft is."""
        drafted, accepted = self._counts.tolist()
        return (
            Total("draft_tokens", "Tokens of the draft that the model has judged.", drafted),
            Total(
                "accepted_draft_tokens", "Tokens of the draft that became part of a text.", accepted
            ),
        )

    def reset(self) -> None:
        """As `Decoder.reset`."""
        self._texts = self._programs.empty(
            num_rows=self.num_slots, max_length=self.max_length, max_new_tokens=self.max_length
        )
        self._unsent = Unsent(self.num_slots)
        self._judged = np.zeros((2, self.num_slots), np.int32)

    def _read(self, slots: Sequence[int]) -> Mapping[int, Sequence[Drawn]]:
        prompts = self._requests.prompts(slots, self.max_length)
        rows = np.array(slots, np.int32)
        self._texts = self._programs.admit(self._variables, self._texts, rows, *prompts, NO_STOPS)
        self._unsent.begin(slots)
        self._judged[:, slots] = 0
        return self._take(most=1)

    def _step(self) -> Mapping[int, Sequence[Drawn]]:
        self._texts = self._programs.run(
            self._variables,
            self._texts,
            self._requests.is_read,
            self._requests.settings(),
            NO_STOPS,
            np.int32(1),
        )
        drawn = self._take(most=self._num_draft_tokens + 1)
        judged = np.stack(jax.device_get((self._texts.drafted, self._texts.accepted)))
        self._counts += (judged - self._judged).sum(axis=1)
        self._judged = judged
        return drawn

    def _take(self, most: int) -> Mapping[int, Sequence[Drawn]]:
        texts = self._texts
        return self._unsent.take(texts.tokens, texts.logprobs, texts.count, most)
