"""Multi-query associative recall: how often a language model finds the value that belongs to a key.

The task is that of Zoology (Arora et al., 2023, arXiv 2312.04927, section 3); its rows come from the
data source `associative_recall`. An answer counts as right if the value has the highest logit of the
whole vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax import processes
from effjax.evaluation.heldout import geometric_edges


@dataclasses.dataclass(frozen=True)
class Recall:
    """Answers over held-out rows.

    Attributes:
      correct: int64 [D] answers that were right, by the distance in tokens from the query back to
        the first occurrence of its key.
      answers: int64 [D] all answers by distance.
    """

    correct: np.ndarray
    answers: np.ndarray

    @property
    def accuracy(self) -> float:
        """Fraction of all answers that were right."""
        return float(self.correct.sum() / self.answers.sum())

    def by_distance(self, num_bins: int = 12) -> dict[str, np.ndarray]:
        """`start` and `stop` (tokens, stop exclusive), `accuracy` and `answers` [bins], empty bins left out."""
        edges = 1 + geometric_edges(len(self.answers) - 1, num_bins)
        correct, answers = (
            np.add.reduceat(counts, edges[:-1]) for counts in (self.correct, self.answers)
        )
        kept = answers > 0
        share = correct / np.maximum(answers, 1)
        table = {"start": edges[:-1], "stop": edges[1:], "accuracy": share, "answers": answers}
        return {name: column[kept] for name, column in table.items()}


def evaluate_recall(
    model: nn.Module, variables: Any, batches: Iterable[Mapping[str, Array]]
) -> Recall:
    """Accuracy at the targets that `loss_mask` keeps, which are the values asked for.

    Args:
      model: a language model.
      variables: its variables.
      batches: batches for language models, from the source `associative_recall`.

    Raises:
      ValueError: if no batch has an answer.
    """
    step = _make_step(model)
    totals = None
    for batch in batches:
        counts = np.asarray(processes.fetch(step(variables, dict(batch))), np.int64)
        totals = counts if totals is None else totals + counts
    if totals is None or not totals[1].sum():
        raise ValueError("batches have no target with loss_mask > 0; valid: one or more")
    return Recall(correct=totals[0], answers=totals[1])


@functools.lru_cache(maxsize=8)
def _make_step(model: nn.Module) -> Callable[..., Int[Array, "2 T"]]:
    @jax.jit
    def step(variables, batch):
        tokens = batch["tokens"]
        output: Any = model.apply(
            variables, tokens, positions=batch["positions"], segment_ids=batch["segment_ids"]
        )
        asked = batch["loss_mask"] > 0
        right = asked & (jnp.argmax(output.logits, axis=-1) == batch["targets"])
        distance = distances(tokens, batch["segment_ids"])
        return jnp.stack([_count(right, distance), _count(asked, distance)])

    return step


def distances(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Tokens from each token back to the first one of its segment that is equal; 0 if it is that one."""
    equal = tokens[:, :, None] == tokens[:, None, :]
    equal &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.arange(tokens.shape[1]) - jnp.argmax(equal, axis=-1)


def _count(chosen, distance) -> Int[Array, " T"]:
    length = chosen.shape[1]
    return jax.ops.segment_sum(chosen.astype(jnp.int32).ravel(), distance.ravel(), length)
