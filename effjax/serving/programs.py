"""The one table of compiled programs: whoever makes texts with a model uses those that others have compiled for it."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax


@functools.lru_cache(maxsize=64)
def compiled(function: Callable[..., Any], *parts: Hashable, **options: Any) -> Callable[..., Any]:
    """A pure function of models and arrays, compiled for these models.

    It compiles anew for shapes that it has not seen; equal models share it.

    Args:
      function: takes `parts`, then arrays.
      *parts: its first arguments, models and numbers, which are static.
      **options: of `jax.jit`, counted without the parts.
    """
    return jax.jit(functools.partial(function, *parts), **options)
