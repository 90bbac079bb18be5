"""Objectives: `(model, variables, batch, rng, *, fields) -> (loss, metrics)`; no rng means evaluation."""

from effjax.objectives.classification import classification
from effjax.objectives.contrastive import contrastive
from effjax.objectives.language_modeling import next_token

__all__ = ["classification", "contrastive", "next_token"]
