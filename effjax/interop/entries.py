"""The entries of a `config.json`: read by name and type, so that none is misread and none overlooked."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effjax.interop.error import InteropError
from effjax.interop.neutral import NEUTRAL

CONFIG_FILE = "config.json"

_REQUIRED = object()


class Entries:
    """The entries of one config, with a record of which were asked for.

    Attributes:
      values: the entries.
      where: how errors name the config.
      asked: names of the entries asked for.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where
        self.asked: set[str] = set()

    def get(self, name: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """The entry of that name, or `default` if there is none.

        Args:
          name: the entry.
          kind: `int`, `float` (an int will do), `bool`, `str`, `list`, `dict`, or one of these `| None`. Numbers are
            finite and not negative, as all are that describe a model.
          default: without one, an entry that is missing is an error.

        Raises:
          InteropError: if the entry is missing or of another type.
        """
        self.asked.add(name)
        if name not in self.values:
            if default is _REQUIRED:
                raise InteropError(f"{self.where}: {name!r} is missing")
            return default
        value = self.values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not 0 <= value < math.inf:
            raise InteropError(f"{self.where}: {name} is {value}; valid: finite, and not negative")
        if is_number and kind in (float, float | None):
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, int | None)):
            readable = getattr(kind, "__name__", str(kind))
            raise InteropError(f"{self.where}: {name} is {value!r}; valid: {readable}")
        return value

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """The entry of that name, a whole number from 1 on.

        Raises:
          InteropError: as `get`, or if it is less.
        """
        value = self.get(name, int, default)
        if value < 1:
            raise InteropError(f"{self.where}: {name} is {value}; valid: at least 1")
        return value

    def only(self, name: str, *valid: Any) -> Any:
        """The entry of that name, which must be one of `valid`; the first of these if there is none.

        Raises:
          InteropError: if it has another value, which is a variant of the model that we lack.
        """
        self.asked.add(name)
        value = self.values.get(name, valid[0])
        if value not in valid:
            supported = ", ".join(dict.fromkeys(map(repr, valid)))
            raise InteropError(
                f"{self.where}: {name}={value!r} is not supported; valid: {supported}"
            )
        return value

    def ignore(self, *names: str) -> None:
        """Takes note that these entries, if they are there, change nothing of this model."""
        self.asked.update(names)

    def overlooked(self) -> dict[str, Any]:
        """The entries that nobody asked for and that are not known to be neutral."""
        return {k: v for k, v in self.values.items() if k not in self.asked and k not in NEUTRAL}


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
      InteropError: if there is none, or it is not a JSON object.
    """
    file = folder / CONFIG_FILE
    try:
        values = json.loads(file.read_text("utf-8"), object_hook=_number)
    except FileNotFoundError:
        raise InteropError(
            f"{folder} has no {CONFIG_FILE}; valid: a Hugging Face model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise InteropError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InteropError(f"{file} holds a {type(values).__name__}; valid: a JSON object")
    return values


def _number(value: dict[str, Any]) -> Any:
    """What transformers 5 writes for the numbers that JSON has not: {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
