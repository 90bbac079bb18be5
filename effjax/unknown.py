"""The answer to a name that nothing has."""

import difflib
from collections.abc import Iterable
from typing import Any


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest match first, then all that are."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known) or 'none'})"
