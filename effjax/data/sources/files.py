"""Finding files by path and glob, and reading documents out of them."""

import dataclasses
import glob
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np


def find_files(where: str, patterns: str | Iterable[str]) -> list[Path]:
    """Files that paths and globs name, sorted, each once.

    Args:
      where: the field, as errors name it.
      patterns: paths or globs (`**` crosses folders).

    Raises:
      ValueError: if there is no pattern, or one names no file or a folder.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(f"{where} is empty; valid: one or more files or globs")
    found = set()
    for pattern in patterns:
        if Path(pattern).is_dir():
            example = str(Path(pattern) / "**" / "*.txt")
            raise ValueError(
                f"{where} is {pattern!r}, a folder; valid: files or globs such as {example!r}"
            )
        # A path that exists is that file, even when its name has brackets that a glob would
        # interpret.
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = [match for match in matches if Path(match).is_file()]
        if not matches:
            raise ValueError(
                f"{where} is {pattern!r}, which matches no file; valid: existing files or globs"
            )
        found.update(matches)
    return [Path(match) for match in sorted(found)]


def keys_of(files: list[Path]) -> list[str]:
    """Paths below the folder common to all: names that do not depend on where the corpus lies."""
    root = os.path.commonpath([file.absolute().parent for file in files])
    return [file.absolute().relative_to(root).as_posix() for file in files]


@dataclasses.dataclass(frozen=True, eq=False)
class FileSpans:
    """Documents that are spans of bytes in files, read when they are asked for. A grain
    random-access source.

    Attributes:
      files: the files.
      file_index: int64 [n], which file each document is in.
      start: int64 [n], its first byte.
      stop: int64 [n], the byte after its last.
    """

    files: tuple[Path, ...]
    file_index: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, stop = int(self.start[index]), int(self.stop[index])
        with open(self.files[self.file_index[index]], "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> "FileSpans":
        """The documents at these indices."""
        return FileSpans(
            self.files, self.file_index[indices], self.start[indices], self.stop[indices]
        )

    def __repr__(self) -> str:
        return f"FileSpans({len(self)} documents in {len(self.files)} files)"


def whole_files(files: Iterable[Path]) -> FileSpans:
    """Each file that is not empty as one document."""
    files = tuple(files)
    sizes = np.array([file.stat().st_size for file in files], np.int64)
    (index,) = np.nonzero(sizes)
    return FileSpans(files, index, np.zeros_like(index), sizes[index])


def split_file(file: Path, separator: bytes) -> np.ndarray:
    """Spans (start, stop) between the separators of a file, int64 [n, 2], without empty ones."""
    if file.stat().st_size == 0:  # mmap refuses an empty file
        return np.empty((0, 2), np.int64)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        spans = [span for span in _between(data, separator) if span[0] < span[1]]
    return np.array(spans, np.int64).reshape(-1, 2)


def _between(data: mmap.mmap, separator: bytes) -> Iterator[tuple[int, int]]:
    start = 0
    while (found := data.find(separator, start)) >= 0:
        yield start, found
        start = found + len(separator)
    yield start, len(data)
