"""Text by speculative decoding: what `generate` gives, in fewer passes of the model."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from effjax.models import SequenceModel
from effjax.serving import speculative
from effjax.serving.generation import Generation
from effjax.serving.inputs import Inputs
from effjax.serving.prompts import TokenIds, bucket
from effjax.serving.sampling import PLAIN, Sampling


@dataclasses.dataclass(frozen=True)
class Speculation(Generation):
    """What came after each prompt, and what the draft did for it.

    Attributes:
      passes: [B] passes of the target after the one over the prompt, as long as the row went on.
      drafted: [B] tokens of the draft that the target has judged.
      accepted: [B] those that are in the text.
    """

    passes: Int[np.ndarray, " B"]
    drafted: Int[np.ndarray, " B"]
    accepted: Int[np.ndarray, " B"]


def speculate(
    model: SequenceModel,
    variables: Any,
    draft: SequenceModel,
    draft_variables: Any,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    *,
    num_draft_tokens: int = 4,
    sampling: Sampling = PLAIN,
    stop_tokens: Collection[int] = (),
    key: Key[Array, "..."] | None = None,
) -> Speculation:
    """Continues prompts as `generate` does: with the same distribution, and greedily with the same tokens.

    What stays of a draft is decided by the distributions after repetition penalty, temperature and filters, so these
    are exact too. Sampled texts are other draws than those of `generate` by the same key. As there, a row's tokens
    depend on its prompt and its key alone; programs are compiled for two models, a number of rows, and lengths up to
    the next power of two; and a mixture of experts drops no token.

    Args:
      model: the target, as for `generate`.
      variables: its variables.
      draft: any model of the same vocabulary; see also `early_exit`.
      draft_variables: its variables.
      prompts: token ids of each prompt, at least one.
      max_new_tokens: most tokens that a row gets.
      num_draft_tokens: tokens that are drafted before each pass of the target.
      sampling: how tokens are drawn.
      stop_tokens: ids that end a row.
      key: as for `generate`.

    Raises:
      ValueError: as `generate` does for either model, for models of different vocabularies, or no tokens to draft.
    """
    # Reading the prompt gives a token, and so does judging a draft: a longer one could not stay.
    count = min(num_draft_tokens, max(1, max_new_tokens - 2))
    programs = speculative.programs(model, draft, count)
    inputs = Inputs.of((model, draft), prompts, max_new_tokens, sampling, stop_tokens, key)
    num_rows, both = len(inputs.lengths), (variables, draft_variables)
    texts = programs.begin(
        both,
        inputs.prompts,
        inputs.lengths,
        inputs.keys,
        np.full(num_rows, max_new_tokens, np.int32),
        inputs.settings,
        inputs.stop_tokens,
        max_length=inputs.max_length,
        max_new_tokens=bucket(max_new_tokens),
    )
    texts = programs.run(
        both,
        texts,
        np.ones(num_rows, bool),
        inputs.settings,
        inputs.stop_tokens,
        np.int32(max_new_tokens),
    )
    drawn = jax.device_get((texts.tokens, texts.logprobs, texts.count, texts.stopped))
    tokens, logprobs, lengths, stopped = drawn
    passes, drafted, accepted = jax.device_get((texts.passes, texts.drafted, texts.accepted))
    return Speculation(
        tokens=tokens[:, :max_new_tokens],
        logprobs=logprobs[:, :max_new_tokens],
        lengths=lengths,
        stopped=stopped,
        passes=passes,
        drafted=drafted,
        accepted=accepted,
    )
