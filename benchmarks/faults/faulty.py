"""Parts that fail as real ones do, at the command of the environment: the config of a run stays the same."""

import dataclasses
import itertools
import os
import time
from typing import Any

import jax.numpy as jnp

from benchmarks.faults import FAULT
from effjax.data.sources import TextFiles
from effjax.objectives.language_modeling import next_token
from effjax.registry import register

# Of the sum of a batch's tokens: about one batch in so many has no finite loss.
NAN_EVERY = 13


class _Documents:
    """Documents on a disk that is slow, loses its connection now and then, or is gone after a while."""

    def __init__(self, documents: Any):
        self._documents = documents
        self._fault = os.environ.get(FAULT)
        self._reads = itertools.count()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> bytes:
        number = next(self._reads)
        if self._fault == "slow" and number % 8 == 7:
            time.sleep(0.5)
        if self._fault == "flaky" and number % 10 in (3, 4):
            raise ConnectionResetError(104, "Connection reset by peer")
        if self._fault == "gone" and number >= 24:
            raise OSError(5, "Input/output error")
        return self._documents[index]


@register("source", "faulty_text")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultyText(TextFiles):
    """Text files; the fault that the environment names is that of training documents."""

    def documents(self, split: str) -> Any:
        documents = super().documents(split)
        return _Documents(documents) if split == "train" else documents


@register("objective", "faulty_next_token")
def faulty_next_token(model, variables, batch, rng):
    """Next-token prediction; with the fault "nan" some batches, always the same, give a loss that is no number."""
    loss, metrics = next_token(model, variables, batch, rng)
    if rng is None or os.environ.get(FAULT) != "nan":
        return loss, metrics
    hit = jnp.sum(batch["tokens"]) % NAN_EVERY == 0
    return loss * jnp.where(hit, jnp.nan, 1.0), metrics
