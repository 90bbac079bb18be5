"""Files of token ids that somebody has tokenised before: memory-mapped `.npy` or raw `.bin`, or
ArrayRecord."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from effjax.data.sources.files import find_files, keys_of
from effjax.data.splits import check_fraction, check_split, split_mask
from effjax.registry import register

DTYPES = ("uint16", "uint32", "int32")
_ARRAY_RECORD = (".array_record", ".arrayrecord", ".arecord")
_SUFFIXES = (".npy", ".bin", *_ARRAY_RECORD)
_SCAN = 1 << 24  # ids looked at at once while a file is scanned: 64 MB


@register("source", "tokens")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """Documents as arrays of token ids. The configured tokenizer must be the one that wrote them.

    `.npy` and `.bin` files are one-dimensional and memory-mapped; `separator_id` ends each document
    and is taken out, since the pipeline puts the tokenizer's own bos and eos around documents. They
    are scanned once, at the speed of memory, for separators and for the largest id. In ArrayRecord
    files each record is one document of raw ids.

    Attributes:
      paths: files and globs (`**` crosses folders); `.npy`, `.bin`, `.array_record`, `.arrayrecord`
        or `.arecord`.
      dtype: type of the ids in files that do not say it (`.bin`, ArrayRecord), little-endian:
        uint16, uint32 or int32.
      separator_id: id at the end of a document; None makes each `.npy` or `.bin` file one document.
      heldout_fraction: share of the documents that is held out, by a hash of file name and document
        number. Not used with `heldout_paths`.
      heldout_paths: files and globs that are the held-out text; `paths` is then for training only.
    """

    paths: str | tuple[str, ...]
    dtype: str = "uint16"
    separator_id: int | None = None
    heldout_fraction: float = 0.1
    heldout_paths: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_fraction("source 'tokens'", self.heldout_fraction)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"source 'tokens': dtype is {self.dtype!r}; valid: {', '.join(DTYPES)}"
            )
        if self.separator_id is not None and self.separator_id < 0:
            raise ValueError(
                f"source 'tokens': separator_id is {self.separator_id}; valid: None or an id >= 0"
            )

    def documents(self, split: str) -> "TokenDocuments":
        """The documents of one split, in the order of file names.

        Raises:
          ValueError: if a path names no file, a file holds something else than ids, or the split
            would be empty.
        """
        check_split(split)
        own_heldout = split == "heldout" and bool(self.heldout_paths)
        field = "heldout_paths" if own_heldout else "paths"
        fraction = 0.0 if self.heldout_paths else self.heldout_fraction
        files = find_files(f"source 'tokens': {field}", getattr(self, field))
        readers = [self._open(field, file) for file in files]
        kept = [
            split_mask(key, len(reader), "train" if own_heldout else split, fraction)
            for key, reader in zip(keys_of(files), readers, strict=True)
        ]
        documents = TokenDocuments(readers, kept)
        if not len(documents):
            raise ValueError(
                f"source 'tokens': heldout_fraction is {fraction}, which leaves split {split!r} "
                f"none of {sum(map(len, readers))} document(s); valid: more documents (set "
                "separator_id), another fraction, or heldout_paths"
            )
        return documents

    def _open(self, field: str, file: Path) -> "_Flat | _Records":
        where = f"source 'tokens': {field} has {str(file)!r}"
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{where}; valid endings: {', '.join(_SUFFIXES)}")
        if file.stat().st_size == 0:
            raise ValueError(f"{where}, an empty file; valid: a file with token ids")
        if file.suffix in _ARRAY_RECORD:
            return _Records(str(file), np.dtype(self.dtype).newbyteorder("<"))
        ids = _map(where, file, self.dtype)
        return _Flat(where, ids, self.separator_id)


class TokenDocuments:
    """Documents of token ids out of several files. A grain random-access source of int32 [n]."""

    def __init__(self, readers: "Sequence[_Flat | _Records]", kept: Sequence[np.ndarray]):
        """Takes the documents of each reader where its mask is true."""
        self._readers = readers
        self._reader_index = np.repeat(np.arange(len(readers)), [mask.sum() for mask in kept])
        self._document_index = np.concatenate([np.flatnonzero(mask) for mask in kept])

    @property
    def largest_id(self) -> int | None:
        """The largest id; None for ArrayRecord files, where only reading all would tell."""
        known = [reader.largest_id for reader in self._readers if reader.largest_id is not None]
        return max(known, default=None)

    def __len__(self) -> int:
        return len(self._document_index)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        reader = self._readers[self._reader_index[index]]
        return reader.read(int(self._document_index[index])).astype(np.int32)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"TokenDocuments({len(self)} documents in {len(self._readers)} files)"


class _Flat:
    """The documents of one memory-mapped array of ids."""

    def __init__(self, where: str, ids: np.ndarray, separator_id: int | None):
        self._ids = ids
        ends, self.largest_id = _scan(where, ids, separator_id)
        starts = np.concatenate([[0], ends + 1])
        stops = np.concatenate([ends, [len(ids)]])
        filled = starts < stops
        self._starts, self._stops = starts[filled], stops[filled]

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> np.ndarray:
        return self._ids[self._starts[index] : self._stops[index]]


class _Records:
    """The documents of one ArrayRecord file."""

    largest_id = None

    def __init__(self, path: str, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self._records = grain.sources.ArrayRecordDataSource(path)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> np.ndarray:
        record = self._records[index]
        where = f"source 'tokens': record {index} of {self._path!r}"
        if len(record) % self._dtype.itemsize:
            raise ValueError(
                f"{where} has {len(record)} bytes; "
                f"valid: a multiple of {self._dtype.itemsize} (dtype {self._dtype.name})"
            )
        ids = np.frombuffer(record, self._dtype)
        if ids.dtype.kind == "i" and len(ids) and ids.min() < 0:
            raise ValueError(f"{where} has the id {ids.min()}; valid: ids >= 0")
        return ids


def _map(where: str, file: Path, dtype: str) -> np.ndarray:
    """Memory-maps one file of ids and checks its shape and type."""
    if file.suffix == ".bin":
        itemsize = np.dtype(dtype).itemsize
        if file.stat().st_size % itemsize:
            raise ValueError(
                f"{where} of {file.stat().st_size} bytes; "
                f"valid: a multiple of {itemsize} (dtype {dtype})"
            )
        return np.memmap(file, np.dtype(dtype).newbyteorder("<"), mode="r")
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"{where}, which cannot be read ({error}); valid: a .npy array of token ids"
        ) from error
    if ids.ndim != 1 or ids.dtype.name not in DTYPES:
        raise ValueError(
            f"{where} of dtype {ids.dtype} and {ids.ndim} axes; "
            f"valid: dtype {', '.join(DTYPES)} and one axis"
        )
    if not ids.size:
        raise ValueError(f"{where}, an empty array; valid: an array with token ids")
    return ids


def _scan(where: str, ids: np.ndarray, separator_id: int | None) -> tuple[np.ndarray, int]:
    """Positions of the separators, and the largest id of the documents."""
    ends, largest = [], 0
    for start in range(0, len(ids), _SCAN):
        chunk = np.asarray(ids[start : start + _SCAN])
        if chunk.dtype.kind == "i" and chunk.min() < 0:
            raise ValueError(f"{where} with the id {chunk.min()}; valid: ids >= 0")
        if separator_id is not None:
            is_end = chunk == separator_id
            ends.append(start + np.flatnonzero(is_end))
            chunk = chunk[~is_end]
        largest = max(largest, int(chunk.max(initial=0)))
    return np.concatenate(ends) if ends else np.empty(0, np.int64), largest
