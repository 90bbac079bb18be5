"""Held-out metrics while training goes on: quick, over the first batches of the held-out split."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from effjax.evaluation.heldout import evaluate_language_model

PREFIX = "heldout/"


class Validation:
    """Measures a model on the same held-out batches each time.

    A model that predicts tokens is measured by its cross-entropy, any other by its objective.
    """

    def __init__(
        self,
        objective: Callable,
        batches: Callable[[], Iterator[Mapping[str, Any]]],
        token_num_bytes: np.ndarray,
        output_sharding: jax.sharding.Sharding,
    ):
        """Prepares for repeated use.

        Args:
          objective: `(model, variables, batch, rng) -> (loss, metrics)`.
          batches: called for each measurement; yields batches that are on the devices.
          token_num_bytes: int32 [V], bytes of text that each token stands for.
          output_sharding: where results go; replicated over the mesh.
        """
        self._batches = batches
        self._token_num_bytes = token_num_bytes
        self._output_sharding = output_sharding
        self._objective = jax.jit(
            lambda model, variables, batch: objective(model, variables, batch, None),
            static_argnums=0,
            out_shardings=output_sharding,
        )

    def __call__(self, model: Any, variables: Any) -> dict[str, float]:
        """`heldout/loss` and what belongs to it: `heldout/bits_per_byte`, or the metrics of the objective."""
        batches = self._batches()
        first = next(batches, None)
        if first is None:
            raise ValueError("the held-out split has no batch; valid: a source with held-out text")
        batches = _chain(first, batches)
        if "loss_mask" in first:
            found = evaluate_language_model(
                model,
                variables,
                batches,
                self._token_num_bytes,
                output_sharding=self._output_sharding,
            )
            means = {"loss": found.loss}
            if found.bits_per_byte is not None:
                means["bits_per_byte"] = found.bits_per_byte
        else:
            means = self._mean_objective(model, variables, batches)
        return {PREFIX + name: value for name, value in means.items()}

    def _mean_objective(self, model, variables, batches) -> dict[str, float]:
        totals: dict[str, float] = {}
        total_weight = 0.0
        for batch in batches:
            loss, metrics = jax.device_get(self._objective(model, variables, batch))
            weight = float(metrics.pop("weight", 1.0))
            total_weight += weight
            for name, value in {**metrics, "loss": loss}.items():
                totals[name] = totals.get(name, 0.0) + weight * float(value)
        return {name: total / total_weight for name, total in totals.items()}


def _chain(first, rest):
    yield first
    yield from rest
