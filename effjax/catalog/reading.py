"""The entries, read from the files in `papers/`."""

import functools
import tomllib
from importlib import resources

from effjax.catalog.entry import Entry, parse
from effjax.unknown import unknown


def entries(family: str | None = None) -> tuple[Entry, ...]:
    """The papers that work in this library, by family and name.

    Args:
      family: only those of this family, one of `families()`; None: all.

    Raises:
      ValueError: for an unknown family.
    """
    if family is None:
        return _read()
    if family not in families():
        raise ValueError(f"catalog: {unknown('family', family, families())}")
    return tuple(entry for entry in _read() if entry.family == family)


def families() -> tuple[str, ...]:
    """The families of which there are entries, sorted."""
    return tuple(sorted({entry.family for entry in _read()}))


@functools.cache
def _read() -> tuple[Entry, ...]:
    papers = resources.files(__package__) / "papers"
    files = [file for file in papers.iterdir() if file.name.endswith(".toml")]
    read = [parse(f.name.removesuffix(".toml"), tomllib.loads(f.read_text("utf-8"))) for f in files]
    return tuple(sorted(read, key=lambda entry: (entry.family, entry.name.lower())))
