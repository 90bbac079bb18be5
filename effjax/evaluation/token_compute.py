"""Which token got how much compute, for models that do not treat all tokens alike.

Parts report it under `token/...` (see `effjax.nn.scalars`): the recursions of each token, or the true
experts that it used, summed over the layers.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from effjax import processes
from effjax.evaluation.forward import inputs_of
from effjax.evaluation.text_grid import Passage, passage

PREFIX = "token/"


@dataclasses.dataclass(frozen=True)
class TokenCompute:
    """One per-token number over held-out text.

    Attributes:
      counts: value to number of tokens, padding left out.
      passages: the first documents, for a picture.
    """

    counts: dict[float, int]
    passages: list[Passage]

    @property
    def mean(self) -> float:
        """Average over the tokens."""
        total = sum(self.counts.values())
        return sum(value * count for value, count in self.counts.items()) / total


def measure_token_compute(
    forward: Callable[..., tuple[Array, Mapping[str, Array]]],
    variables: Any,
    batches: Iterable[Mapping[str, Array]],
    tokenizer: Any,
    *,
    max_passage_tokens: int = 4096,
) -> dict[str, TokenCompute]:
    """Collects every per-token number that a language model reports.

    Args:
      forward: `(variables, inputs) -> (logits, metrics)` (`forward.compile_forward`).
      variables: of the model.
      batches: batches for language models.
      tokenizer: turns the tokens of passages back into bytes.
      max_passage_tokens: tokens of text that are kept for pictures.

    Returns:
      By the part of the name after `token/` (`depth`, `experts`); empty for a model that treats all
      tokens alike.
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    passages: dict[str, list[Passage]] = collections.defaultdict(list)
    num_kept = 0
    for batch in batches:
        _, metrics = forward(variables, inputs_of(batch))
        reported = {k: x for k, x in metrics.items() if k.startswith(PREFIX)}
        if not reported:
            break
        reported, segment_ids, tokens = processes.fetch(
            (reported, batch["segment_ids"], batch["tokens"])
        )
        keep = num_kept < max_passage_tokens
        for name, values in reported.items():
            seen, number = np.unique(values[segment_ids > 0], return_counts=True)
            counts[name].update(dict(zip(seen.tolist(), number.tolist(), strict=True)))
            if keep:
                passages[name] += _passages(tokenizer, tokens, values, segment_ids)
        num_kept += int(np.count_nonzero(segment_ids))
    return {
        name.removeprefix(PREFIX): TokenCompute(dict(counts[name]), passages[name])
        for name in counts
    }


def _passages(tokenizer: Any, tokens, values, segment_ids) -> Iterator[Passage]:
    """The documents of a batch, row by row."""
    for row in range(len(tokens)):
        for segment in range(1, segment_ids[row].max() + 1):
            inside = segment_ids[row] == segment
            yield passage(tokenizer, tokens[row, inside], values[row, inside])
