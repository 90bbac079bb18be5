"""Training: config-driven, sharded, resumable.

summary = effjax.training.fit(config, "runs/mor")
"""

from effjax.training.fitting import fit
from effjax.training.loop import NonFiniteLossError

__all__ = ["NonFiniteLossError", "fit"]
