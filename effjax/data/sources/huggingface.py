"""Hugging Face `datasets`, streamed: documents are read as they come, nothing is stored."""

import copy
import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import grain

from effjax.data.retries import NO_PATIENCE, Patience
from effjax.data.splits import check_fraction, check_split, in_split
from effjax.registry import register


@register("source", "hf")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceDataset:
    """A text column of a Hugging Face dataset, streamed. Needs the extra `effjax[hf]`.

    Examples without text are left out. The stream comes in the order of the dataset; the pipeline
    shuffles the packed rows.

    Attributes:
      path: name on the hub, a local folder, or a builder such as "json" or "text" (with
        `data_files`).
      subset: the dataset's configuration, where it has several.
      data_files: files or globs for the builders.
      text_field: the column that holds the text.
      train_split: name of the split to train on.
      heldout_split: name of the split that is held out; None holds out a share of `train_split`.
      heldout_fraction: that share, chosen by a hash of the text itself: duplicates fall on one
        side. Not used with `heldout_split`.
    """

    path: str
    subset: str | None = None
    data_files: str | tuple[str, ...] | None = None
    text_field: str = "text"
    train_split: str = "train"
    heldout_split: str | None = None
    heldout_fraction: float = 0.1

    def __post_init__(self):
        check_fraction("source 'hf'", self.heldout_fraction)

    def documents(self, split: str) -> "StreamedDocuments":
        """The stream of one split.

        Raises:
          ValueError: if `datasets` is not installed, or finds no such dataset, split or column.
        """
        check_split(split)
        by_hash = self.heldout_split is None
        held_out = self.train_split if self.heldout_split is None else self.heldout_split
        dataset = self._load(self.train_split if split == "train" else held_out)
        features = dataset.features  # None where only the data would tell
        if features is not None and self.text_field not in features:
            raise ValueError(_no_column(self.text_field, features))
        return StreamedDocuments(
            dataset, self.text_field, split, self.heldout_fraction if by_hash else None
        )

    def _load(self, of_dataset: str):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "source 'hf' needs the package datasets, which is not installed; "
                "valid: pip install effjax[hf]"
            ) from error
        files = list(self.data_files) if isinstance(self.data_files, tuple) else self.data_files
        try:
            return datasets.load_dataset(
                self.path, self.subset, data_files=files, split=of_dataset, streaming=True
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"source 'hf': path {self.path!r}, subset {self.subset!r}, data_files "
                f"{self.data_files!r}, split {of_dataset!r} cannot be loaded ({error}); "
                "valid: a dataset, subset and split that datasets knows"
            ) from error


class StreamedDocuments(grain.IterDataset):
    """A stream of documents, `bytes` each, as a grain dataset whose iterators can be saved."""

    def __init__(
        self,
        dataset: Any,
        text_field: str,
        split: str,
        heldout_fraction: float | None,
        patience: Patience = NO_PATIENCE,
    ):
        """Wraps a `datasets.IterableDataset`.

        Args:
          dataset: the stream.
          text_field: the column with the text.
          split: which side of the hash split to keep.
          heldout_fraction: share of the texts that is held out by hash; None keeps every text.
          patience: how often the stream is opened again where it broke.
        """
        super().__init__()
        self._dataset = dataset
        self._text_field = text_field
        self.split = split
        self._heldout_fraction = heldout_fraction
        self.patience = patience

    def patient(self, patience: Patience) -> "StreamedDocuments":
        """The same stream, opened again where it breaks."""
        return self._like(self._dataset, patience)

    def shard(self, index: int, count: int) -> "StreamedDocuments":
        """The share of one of several streams: whole files if they divide evenly, else every nth example."""
        from datasets.distributed import split_dataset_by_node

        shared = split_dataset_by_node(self._dataset, rank=index, world_size=count)
        return self._like(shared, self.patience)

    def _like(self, dataset: Any, patience: Patience) -> "StreamedDocuments":
        return StreamedDocuments(
            dataset, self._text_field, self.split, self._heldout_fraction, patience
        )

    def text(self, example: dict[str, Any]) -> bytes | None:
        """The text of an example, or None if it is empty or on the other side of the split."""
        if self._text_field not in example:
            raise ValueError(_no_column(self._text_field, example))
        text = (example[self._text_field] or "").encode("utf-8", "surrogatepass")
        fraction = self._heldout_fraction
        if not text or (fraction is not None and not in_split(text, self.split, fraction)):
            return None
        return text

    def __iter__(self) -> grain.DatasetIterator:
        # A copy for each iterator: `datasets` keeps the position of a stream in the dataset object.
        return _StreamIterator(self, copy.deepcopy(self._dataset))


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, documents: StreamedDocuments, dataset: Any):
        super().__init__()
        self._documents = documents
        self._dataset = dataset
        self._examples = iter(dataset)
        self._found = False

    def __next__(self) -> bytes:
        while (example := self._next_example()) is not None:
            text = self._documents.text(example)
            if text is not None:
                self._found = True
                return text
        if not self._found:
            # An endless repetition of nothing would hang.
            raise ValueError(
                f"source 'hf': the stream has no text in split {self._documents.split!r} for this "
                "share; valid: at least one text"
            )
        raise StopIteration

    def _next_example(self) -> dict[str, Any] | None:
        """The next example, or None at the end of the stream."""
        return self._documents.patience.call(
            lambda: next(self._examples, None),
            "data: the stream of source 'hf'",
            failures=_broken_connections(),
            reopen=self._reopen,
        )

    def _reopen(self) -> None:
        """Goes on after the last example that came; the iterator that failed is at its end."""
        self.set_state(self.get_state())

    def get_state(self) -> dict[str, Any]:
        return {"dataset": self._dataset.state_dict(), "found": self._found}

    def set_state(self, state: dict[str, Any]) -> None:
        self._dataset.load_state_dict(state["dataset"])
        self._examples = iter(self._dataset)
        self._found = state["found"]


def _broken_connections() -> tuple[type[Exception], ...]:
    """What a broken connection may raise: the libraries below `datasets` have exceptions of their own for it."""
    of_libraries = (("aiohttp", "ClientError"), ("httpx", "HTTPError"))
    found = (
        getattr(sys.modules[name], error) for name, error in of_libraries if name in sys.modules
    )
    return (OSError, *found)


def _no_column(text_field: str, columns: Iterable[str]) -> str:
    return f"source 'hf': text_field is {text_field!r}; valid: {', '.join(map(repr, columns))}"
