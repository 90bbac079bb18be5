"""effjax: efficient deep learning in JAX, as parts that compose.

`import effjax` is enough for `effjax.models.create(...)`: a room is imported when it is first asked for.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # For type checkers and editors, which do not run `__getattr__`: the rooms below.
    from effjax import catalog as catalog
    from effjax import data as data
    from effjax import depth as depth
    from effjax import evaluation as evaluation
    from effjax import ffn as ffn
    from effjax import heads as heads
    from effjax import interop as interop
    from effjax import mixers as mixers
    from effjax import models as models
    from effjax import nn as nn
    from effjax import objectives as objectives
    from effjax import optim as optim
    from effjax import pytree as pytree
    from effjax import routing as routing
    from effjax import serving as serving
    from effjax import training as training

__version__ = "0.1.0"

_ROOMS = (
    "catalog",
    "data",
    "depth",
    "evaluation",
    "ffn",
    "heads",
    "interop",
    "mixers",
    "models",
    "nn",
    "objectives",
    "optim",
    "pytree",
    "routing",
    "serving",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    if name not in _ROOMS:
        raise AttributeError(f"module 'effjax' has no attribute {name!r}")
    return importlib.import_module(f"effjax.{name}")


def __dir__() -> list[str]:
    return sorted((*globals(), *_ROOMS))
