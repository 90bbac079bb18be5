"""effjax: efficient deep learning in JAX, as parts that compose.

`import effjax` is enough for `effjax.models.create(...)`: a room is imported when it is first asked for.
"""

import importlib
from types import ModuleType

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
