"""The default text: the source code of the running Python's own standard library.

It is real text that exists on every machine, so nothing is downloaded and nothing is bundled.
Tests, generated build settings and installed packages are left out; what remains is some 10 MB of
hand-written code and prose.
"""

import dataclasses
import functools
import sysconfig
from pathlib import Path

from effjax.data.sources.files import FileSpans, whole_files
from effjax.data.splits import check_fraction, in_split
from effjax.registry import register

_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written by the build of this very interpreter: compiler flags and paths, not text.
_GENERATED = ("_sysconfigdata", "config-")


@register("source", "stdlib")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """Every `.py` file of the standard library as one document.

    Attributes:
      heldout_fraction: share of the files that is held out, chosen by a hash of the file's path in
        the library.
    """

    heldout_fraction: float = 0.1

    def __post_init__(self):
        check_fraction("source 'stdlib'", self.heldout_fraction)

    def documents(self, split: str) -> FileSpans:
        """The files of one split, in the order of their names."""
        return whole_files(
            path
            for name, path in library_files().items()
            if in_split(name, split, self.heldout_fraction)
        )


@functools.cache
def library_files() -> dict[str, Path]:
    """Path of each `.py` file of the standard library by its name relative to the library, in order
    of names.

    Raises:
      ValueError: if this Python has no library sources (some are shipped compiled or zipped).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, subfolders, names in root.walk():
        # Pruned while walking: site-packages may be far larger than the library.
        subfolders[:] = [
            s for s in subfolders if s not in _EXCLUDED_FOLDERS and not s.startswith(_GENERATED)
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(_GENERATED):
                path = folder / name
                files[path.relative_to(root).as_posix()] = path
    if not files:
        raise ValueError(
            f"source 'stdlib': no .py file in {str(root)!r}; "
            "valid: a Python that has the sources of its library"
        )
    return dict(sorted(files.items()))
