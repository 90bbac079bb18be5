"""The safetensors files of a checkpoint: one, or several with an index of which tensor is in which."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from effjax.interop.error import InteropError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Tensors are read in blocks of rows, so that only a block at a time is in memory twice.
BLOCK_BYTES = 2**22

# Mapped pages count as memory of the process once they are touched, until the file is mapped anew.
TOUCHED_BYTES = 2**24

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


class MappedFile:
    """A safetensors file of which parts of tensors are read, and little is ever in memory.

    Attributes:
      path: of the file.
      names: of its tensors.

    Raises:
      InteropError: naming the file, if it is missing, truncated or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle, self._touched = self._mapped(), 0
        self.names = frozenset(self._handle.keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and the dtype, as the format calls it, of a tensor."""
        tensor = self._handle.get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor.

        Raises:
          InteropError: if the file is no longer what it was.
        """
        if self._touched > TOUCHED_BYTES:
            del self._handle  # the old map goes before the new one comes
            self._handle, self._touched = self._mapped(), 0
        try:
            tensor = self._handle.get_slice(name)
            part = tensor[index]
        except (OSError, SafetensorError) as error:
            raise InteropError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        # Of each row it is pages that are read, and not only what is asked for.
        self._touched += len(part) * math.prod(tensor.get_shape()[1:]) * part.itemsize
        return part

    def _mapped(self) -> safe_open:
        try:
            return safe_open(self.path, framework="numpy")
        except FileNotFoundError:
            raise InteropError(f"{self.path} is missing: a shard that {INDEX_FILE} lists") from None
        except (OSError, SafetensorError) as error:
            raise InteropError(
                f"{self.path} is truncated or no safetensors file: {error}"
            ) from error


class Shards:
    """The tensors in the files of a folder.

    Args:
      folder: with one file, or with several and their index.
      rename: from the names in the files to those by which the tensors are known here.

    Attributes:
      shapes: shape of each tensor.

    Raises:
      InteropError: naming the file, if one is missing, truncated or no safetensors file, or lacks a tensor that the
        index says it has; or if the folder has weights as pickle only.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = lambda name: name):
        self._places: dict[str, tuple[MappedFile, str]] = {}
        for path, listed in _files(folder).items():
            file = MappedFile(path)
            if absent := sorted(listed - file.names):
                raise InteropError(f"{path} lacks tensors that {INDEX_FILE} lists: {some(absent)}")
            for name in listed or file.names:  # what the index does not list is no part of this
                self._places[rename(name)] = (file, name)
        self.shapes = {name: f.describe(known)[0] for name, (f, known) in self._places.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
          InteropError: if it is not floating point, or a format that only quantised models have.
        """
        file, known = self._places[name]
        _, code = file.describe(known)
        if code not in DTYPES:
            raise InteropError(
                f"{file.path}: tensor {name!r} has dtype {code}; valid: {', '.join(DTYPES)}"
            )
        return DTYPES[code]

    def read_into(self, name: str, spans: tuple[range, ...], destination: np.ndarray) -> None:
        """Writes part of a tensor to an array, cast to its dtype.

        Args:
          name: of the tensor.
          spans: a range for each of its axes.
          destination: an array of as many elements along each axis.

        Raises:
          InteropError: if the file is no longer what it was.
        """
        file, known = self._places[name]
        rows, others = spans[0], tuple(slice(s.start, s.stop) for s in spans[1:])
        row_bytes = self.dtype(name).itemsize * math.prod(map(len, spans[1:]))
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for i in range(0, len(rows), step):
            block = rows[i : i + step]
            destination[i : i + step] = file.read(known, (slice(block.start, block.stop), *others))

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and bits."""
        shape = self.shapes[one]
        if shape != self.shapes[other] or self.dtype(one) != self.dtype(other):
            return False
        dtype = self.dtype(one)
        rows = max(1, BLOCK_BYTES // max(1, dtype.itemsize * math.prod(shape[1:])))
        for i in range(0, shape[0], rows):
            spans = (range(i, min(i + rows, shape[0])), *map(range, shape[1:]))
            blocks = [np.empty([len(span) for span in spans], dtype) for _ in range(2)]
            self.read_into(one, spans, blocks[0])
            self.read_into(other, spans, blocks[1])
            if blocks[0].tobytes() != blocks[1].tobytes():
                return False
        return True


def write_shards(
    folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], np.ndarray], max_bytes: int
) -> None:
    """Writes tensors to one file, or to several with an index; at most one file's tensors are in memory at a time.

    Args:
      folder: where the files go.
      sizes: bytes of each tensor, in the order in which they are to be written.
      tensor: makes the tensor of a name.
      max_bytes: of the tensors of one file; one that is larger has a file of its own.
    """
    groups = _grouped(sizes, max_bytes)
    names = [SINGLE_FILE]
    if len(groups) > 1:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    for file, group in zip(names, groups, strict=True):
        # transformers refuses files that do not say that they are laid out as PyTorch's are.
        save_file({name: tensor(name) for name in group}, folder / file, metadata={"format": "pt"})
    if len(groups) > 1:
        placed = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        (folder / INDEX_FILE).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8"
        )


def some(names: list[str], limit: int = 8) -> str:
    """The first of the names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _grouped(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files of the checkpoint, each with the tensors that the index says it has."""
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: set()}
    index = folder / INDEX_FILE
    if not index.is_file():
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
        why = f" (pickle is not read, for it runs code: {some(pickled)})" if pickled else ""
        raise InteropError(f"{folder} has no weights{why}; valid: {SINGLE_FILE} or {INDEX_FILE}")
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        placed = [(str(name), Path(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InteropError(f"{index} is no index of shards: {error!r}") from error
    files: dict[Path, set[str]] = {}
    for name, file in placed:
        if file.name != str(file):
            raise InteropError(
                f"{index} places {name!r} in {str(file)!r}; valid: a file of the folder"
            )
        files.setdefault(folder / file, set()).add(name)
    return files
