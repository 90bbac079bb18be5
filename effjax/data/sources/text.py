"""Text files as documents."""

import dataclasses
from pathlib import Path

import numpy as np

from effjax.data.sources.files import FileSpans, find_files, keys_of, split_file, whole_files
from effjax.data.splits import check_fraction, check_split, in_split, split_mask
from effjax.registry import register


@register("source", "text")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files, one document a file or one between separators. Empty documents hold no text
    and are left out.

    Attributes:
      paths: files and globs (`**` crosses folders).
      separator: text between two documents of a file, such as a blank line or "<|endoftext|>"; None
        makes each file one document.
      heldout_fraction: share of the documents that is held out, by a hash of the file's path below
        the folder common to all files (and of the document's number, with a separator). Not used
        with `heldout_paths`.
      heldout_paths: files and globs that are the held-out text; `paths` is then for training only.
    """

    paths: str | tuple[str, ...]
    separator: str | None = None
    heldout_fraction: float = 0.1
    heldout_paths: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_fraction("source 'text'", self.heldout_fraction)
        if self.separator == "":
            raise ValueError(
                "source 'text': separator is ''; valid: None or a text that is not empty"
            )

    def documents(self, split: str) -> FileSpans:
        """The documents of one split, in the order of file names.

        Raises:
          ValueError: if a path names no file, or the split would have no document.
        """
        check_split(split)
        own_heldout = split == "heldout" and bool(self.heldout_paths)
        field = "heldout_paths" if own_heldout else "paths"
        fraction = 0.0 if self.heldout_paths else self.heldout_fraction
        patterns = getattr(self, field)
        files = find_files(f"source 'text': {field}", patterns)
        everything, kept = self._scan(files, "train" if own_heldout else split, fraction)
        if not len(everything):
            raise ValueError(
                f"source 'text': {field} is {patterns!r}, without text; valid: files with text"
            )
        if not kept.any():
            raise ValueError(
                f"source 'text': heldout_fraction is {fraction}, which leaves split {split!r} none "
                f"of {len(everything)} document(s); valid: more documents (set separator), another "
                "fraction, or heldout_paths"
            )
        return everything.take(np.flatnonzero(kept))

    def _scan(self, files: list[Path], split: str, fraction: float) -> tuple[FileSpans, np.ndarray]:
        """All documents of the files, and bool [n], which of them are in the split."""
        keys = keys_of(files)
        if self.separator is None:
            everything = whole_files(files)
            kept = np.array([in_split(key, split, fraction) for key in keys])
            return everything, kept[everything.file_index]
        spans = [split_file(file, self.separator.encode()) for file in files]
        counts = [len(here) for here in spans]
        start, stop = np.concatenate(spans).T
        everything = FileSpans(tuple(files), np.repeat(np.arange(len(files)), counts), start, stop)
        masks = [
            split_mask(key, count, split, fraction) for key, count in zip(keys, counts, strict=True)
        ]
        return everything, np.concatenate(masks)
