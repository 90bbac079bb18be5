"""Optimizers and schedules by name; what optax has is used from optax."""

from effjax.optim import schedules
from effjax.optim.optimizers import build, names, spec

__all__ = ["build", "names", "schedules", "spec"]
