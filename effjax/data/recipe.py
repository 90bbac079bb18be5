"""The data part of a config: its fields, its defaults, and the batches it stands for."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np
from grain import DatasetIterator as DataIterator

from effjax import registry
from effjax.data import pipeline
from effjax.data.packing import check_ids
from effjax.data.pairs import encode_pair
from effjax.data.prefetch import PrefetchIterator
from effjax.data.retries import Patience, RandomAccess, Retried
from effjax.data.sources import (
    Documents,
    Pair,
    PairSource,
    RowSource,
    StandardLibrary,
    StreamedDocuments,
    TextSource,
    TokenDocuments,
)
from effjax.data.splits import check_split
from effjax.data.tokenizers import ByteTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Which text, in which tokens, in which batches.

    Attributes:
      source: a source of text, of pairs, or of rows.
      tokenizer: a tokenizer.
      seq_len: positions a row, at least 2.
      batch_size: rows a batch over all processes.
      seed: of the order of the training data, 0 <= seed < 2**32.
      shuffle_window: packed rows that are shuffled together; 1 keeps their order. Takes 16 bytes a
        token of memory, and restoring a state packs up to this many rows anew. The default holds
        all of the standard library in rows of 256: in a narrower window a few long files of tables
        make up much of what a short run sees. Pairs are shuffled globally.
      shards: streams that the training documents are dealt to, each of which makes `batch_size /
        shards` rows of every batch; divides `batch_size`. A process that makes some of the rows
        reads the documents of their streams only, so a multiple of the number of processes lets
        each read no more than its share. Not used for pairs and rows, where each example is made on
        its own.
      prefetch: batches made ahead in a thread; 0 makes none ahead.
      retries: how often a document is tried again that could not be read.
      retry_seconds: wait before the first of these tries, doubled before each that follows.
    """

    source: TextSource | PairSource | RowSource = dataclasses.field(default_factory=StandardLibrary)
    tokenizer: Tokenizer = dataclasses.field(default_factory=ByteTokenizer)
    seq_len: int = 256
    batch_size: int = 16
    seed: int = 0
    shuffle_window: int = 2**15
    shards: int = 1
    prefetch: int = 2
    retries: int = 5
    retry_seconds: float = 1.0

    def __post_init__(self):
        _at_least("seq_len", self.seq_len, 2)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("shuffle_window", self.shuffle_window, 1)
        _at_least("shards", self.shards, 1)
        _at_least("prefetch", self.prefetch, 0)
        _at_least("retries", self.retries, 0)
        _at_least("retry_seconds", self.retry_seconds, 0)
        if self.batch_size % self.shards:
            raise ValueError(
                f"data: batch_size is {self.batch_size}; valid: a multiple of shards = {self.shards}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data: seed is {self.seed}; valid: 0 <= seed < 2**32")


def default_config() -> dict[str, Any]:
    """Every field of the data config with its default, as plain values."""
    return registry.describe_fields(DataRecipe())


def build(
    config: Mapping[str, Any] | ml_collections.ConfigDict,
    *,
    split: str,
    rows: Sequence[int] | None = None,
) -> DataIterator:
    """The batches of a split, or some rows of them.

    The iterator is grain's: `get_state()` returns plain JSON-able values, `set_state(state)` makes
    the next batch the one that would have followed, and `grain.checkpoint.CheckpointSave` puts it
    into an Orbax checkpoint. The states of iterators that share the rows out between them are one
    state together (`joined_state`), from which iterators over other rows go on.

    Args:
      config: fields of `DataRecipe`; missing ones take their defaults.
      split: "train" repeats for ever in shuffled order; "heldout" is one pass in a fixed order, its
        last batch filled with rows of segment 0.
      rows: which rows of each batch to make, increasing; None makes all. What is in a row does not
        depend on which others are made.

    Returns:
      An iterator of dicts of NumPy arrays with B = len(rows) rows: for a source of text or rows as
      `packing.batch_of_rows` describes, for pairs stacked `pairs.encode_pair`.

    Raises:
      ValueError: for an unknown field, a value that is not valid, or a source that finds nothing.
    """
    check_split(split)
    recipe = _recipe(config)
    every_row = range(recipe.batch_size)
    rows = list(every_row if rows is None else rows)
    if not rows or rows != sorted(set(every_row).intersection(rows)):
        raise ValueError(
            f"rows is {rows}; valid: increasing numbers from 0 to batch_size - 1 = {every_row[-1]}"
        )
    share = {"batch_size": recipe.batch_size, "rows": rows}
    batches = (_train if split == "train" else _heldout)(recipe, share)
    return PrefetchIterator(iter(batches), recipe.prefetch)


def tokenizer(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Tokenizer:
    """The tokenizer of a data config."""
    return _recipe(config).tokenizer


def documents(
    config: Mapping[str, Any] | ml_collections.ConfigDict, *, split: str
) -> Iterator[bytes]:
    """The text of a split, a document at a time, as bytes: what the n-gram baselines are fitted on.

    Documents of token ids are decoded. A pair is one document, the query above the code.

    Raises:
      ValueError: as `build` does, and for a source of rows, which has no text.
    """
    check_split(split)
    recipe = _recipe(config)
    if isinstance(recipe.source, PairSource):
        return (f"{p.query}\n{p.document}".encode() for p in recipe.source.pairs(split))
    if isinstance(recipe.source, RowSource):
        raise ValueError(
            f"data: source {registry.describe(recipe.source)} has no text; valid: a source of documents or pairs"
        )
    to_bytes = recipe.tokenizer.decode_bytes
    return (to_bytes(d) if isinstance(d, np.ndarray) else d for d in _find(recipe, split))


def _train(recipe: DataRecipe, share: dict[str, Any]) -> grain.IterDataset:
    found = _find(recipe, "train")
    if isinstance(found, grain.MapDataset):
        return pipeline.train_examples(found, seed=recipe.seed, **share)
    return pipeline.train_batches(
        found,
        recipe.tokenizer,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        shuffle_window=recipe.shuffle_window,
        shards=recipe.shards,
        **share,
    )


def _heldout(recipe: DataRecipe, share: dict[str, Any]) -> grain.IterDataset:
    found = _find(recipe, "heldout")
    if isinstance(found, grain.MapDataset):
        return pipeline.heldout_examples(found, pad_id=recipe.tokenizer.pad_id, **share)
    return pipeline.heldout_batches(
        found,
        recipe.tokenizer,
        seq_len=recipe.seq_len,
        shuffle_window=recipe.shuffle_window,
        **share,
    )


def _find(recipe: DataRecipe, split: str) -> Documents | grain.MapDataset:
    """The documents of a split, or its examples where the source makes these; at least one."""
    source, tokenizer = recipe.source, recipe.tokenizer
    found: Documents | RandomAccess[Pair] | RandomAccess[dict[str, np.ndarray]]
    if isinstance(source, RowSource):
        check_ids(source.vocab_size - 1, tokenizer)
        found = source.rows(split, recipe.seq_len)
    elif isinstance(source, PairSource):
        found = source.pairs(split)
    else:
        found = source.documents(split)
    if isinstance(found, TokenDocuments) and found.largest_id is not None:
        check_ids(found.largest_id, tokenizer)  # now, and not in the middle of training
    patience = Patience(recipe.retries, recipe.retry_seconds)
    if isinstance(found, StreamedDocuments):
        return found.patient(patience)
    if not len(found):
        raise ValueError(
            f"data: source {registry.describe(source)} has nothing in split {split!r}; "
            "valid: another heldout_fraction, or more documents"
        )
    found = Retried(found, patience, registry.describe(source)["name"])
    if isinstance(source, RowSource):
        return grain.MapDataset.source(found)
    if isinstance(source, PairSource):
        encode = functools.partial(encode_pair, tokenizer=tokenizer, seq_len=recipe.seq_len)
        return grain.MapDataset.source(found).map(encode)
    return found


def _recipe(config: Mapping[str, Any] | ml_collections.ConfigDict) -> DataRecipe:
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return DataRecipe(**registry.bind(DataRecipe, given, where="data"))


def _at_least(field: str, value: float, smallest: int) -> None:
    if value < smallest:
        raise ValueError(f"data: {field} is {value}; valid: {smallest} or more")
