"""Variables that leave the house: whether they are a model's, and can be stored."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.interop.error import InteropError
from effjax.interop.shards import DTYPES, some
from effjax.interop.table import flatten


def arrays_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by path.

    Raises:
      InteropError: if there are other variables than parameters.
    """
    if set(variables) != {"params"}:
        raise InteropError(f"variables has {sorted(variables)}; valid: 'params' alone")
    return flatten(variables["params"])


def check_arrays(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that the parameters are those of a model, and of dtypes that safetensors hold here.

    Args:
      arrays: by path.
      shapes: of the model's parameters, by path.

    Raises:
      InteropError: naming those that are not.
    """
    wrong = sorted(arrays.keys() ^ shapes.keys())
    wrong += [
        f"{path} of shape {arrays[path].shape} and not {shape}"
        for path, shape in shapes.items()
        if path in arrays and arrays[path].shape != shape
    ]
    if wrong:
        raise InteropError(
            f"the variables are not those of the model; they differ in {some(wrong)}"
        )
    storable = DTYPES.values()
    odd = [f"{p} is {a.dtype}" for p, a in arrays.items() if np.dtype(a.dtype) not in storable]
    if odd:
        raise InteropError(f"dtypes that cannot be stored: {some(odd)}; valid: floating point")
