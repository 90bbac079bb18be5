"""Training: config-driven, sharded, resumable.

summary = effjax.training.fit(config, "runs/mor")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effjax.training.fitting import fit
    from effjax.training.loop import NonFiniteLossError

__all__ = ["NonFiniteLossError", "fit"]

# Imported when it is asked for: recipes need a config, and evaluation a mesh, of which the loop knows more than they.
_FILES = {"NonFiniteLossError": "loop", "fit": "fitting"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
