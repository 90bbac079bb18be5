"""Sources of documents, of pairs, and of rows.

A text source has `documents(split)`, which returns either a random-access sequence (`__len__`,
`__getitem__`) or a `StreamedDocuments`; a document is `bytes` of UTF-8 text or int32 [n] token ids.
A pair source has `pairs(split)`, a sequence of `Pair`. A row source has `rows(split, seq_len)`, a
sequence of single rows of a language-model batch. `split` is "train" or "heldout"; which document
is on which side is a stable hash (`splits`).
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from effjax.data.associative_recall import AssociativeRecall
from effjax.data.retries import RandomAccess
from effjax.data.sources.files import FileSpans
from effjax.data.sources.huggingface import HuggingFaceDataset, StreamedDocuments
from effjax.data.sources.stdlib import StandardLibrary
from effjax.data.sources.stdlib_pairs import Pair, StandardLibraryPairs
from effjax.data.sources.text import TextFiles
from effjax.data.sources.tokens import TokenDocuments, TokenFiles

Documents = RandomAccess[bytes | np.ndarray] | StreamedDocuments


@runtime_checkable
class TextSource(Protocol):
    """A source of documents for language models."""

    def documents(self, split: str) -> Documents: ...


@runtime_checkable
class PairSource(Protocol):
    """A source of (query, document) pairs for embedders."""

    def pairs(self, split: str) -> Sequence[Pair]: ...


@runtime_checkable
class RowSource(Protocol):
    """A generated task: its rows are examples, and are neither tokenised nor packed."""

    @property
    def vocab_size(self) -> int: ...

    def rows(self, split: str, seq_len: int) -> Sequence[dict[str, np.ndarray]]: ...


__all__ = [
    "AssociativeRecall",
    "Documents",
    "FileSpans",
    "HuggingFaceDataset",
    "Pair",
    "PairSource",
    "RowSource",
    "StandardLibrary",
    "StandardLibraryPairs",
    "StreamedDocuments",
    "TextFiles",
    "TextSource",
    "TokenDocuments",
    "TokenFiles",
]
