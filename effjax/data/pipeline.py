"""Streams of batches: sharded, shuffled, repeated and batched on grain, for training and for
held-out evaluation.

Each function returns a `grain.IterDataset`; its iterator has `get_state` and `set_state`
(JSON-able), and a restored iterator yields the very next batch, bit for bit. Order depends on the
seed and the number of streams, and never on which rows of the batches a process makes.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np

from effjax.data.packing import batch_of_rows, packed_rows
from effjax.data.sources import Documents, StreamedDocuments
from effjax.data.streams import BatchesOfExamples, RowsOfStreams
from effjax.data.tokenizers import Tokenizer

# Held-out documents, and the rows they are packed into, come in one fixed random order: the first
# batches alone are a fair sample, even where a batch is shorter than a document.
_HELDOUT_SEED = 0
# Read in the thread that packs: the last stage prefetches whole batches, and grain's default of 16
# reading threads with 500 documents ahead is made for remote storage.
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def train_batches(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    rows: Sequence[int],
    seed: int,
    shuffle_window: int,
    shards: int,
) -> grain.IterDataset:
    """Endless packed batches, or some rows of them.

    The documents are dealt to streams, each of which makes `batch_size / shards` rows of every batch; only the streams
    that make one of the wanted rows are read. Documents come in another order each epoch; packed rows are then shuffled
    within windows, so that a batch is not made of neighbouring pieces of one long document.

    Args:
      documents: random-access documents, or a stream (which keeps its own order).
      tokenizer: encodes documents of bytes.
      seq_len: T, positions a row.
      batch_size: rows a batch over all processes.
      rows: which of them to make, increasing; B is their number.
      seed: of both shuffles.
      shuffle_window: rows in the windows of all streams together.
      shards: streams; divides `batch_size`.

    Returns:
      A dataset of batches as `packing.batch_of_rows` describes, all positions filled.

    Raises:
      ValueError: if there are fewer documents than streams.
    """
    document_seed, row_seed = _seeds(seed)

    def stream(number: int) -> grain.IterDataset:
        if isinstance(documents, StreamedDocuments):
            dealt = grain.experimental.RepeatIterDataset(documents.shard(number, shards))
        else:
            dealt = grain.MapDataset.source(documents)[number::shards]
            dealt = dealt.shuffle(document_seed).repeat().to_iter_dataset(_READ)
        return grain.experimental.WindowShuffleIterDataset(
            packed_rows(dealt, tokenizer, seq_len),
            window_size=-(-shuffle_window // shards),
            seed=row_seed,
        )

    if not isinstance(documents, StreamedDocuments) and len(documents) < shards:
        raise ValueError(
            f"data: shards is {shards}, with {len(documents)} document(s) in the train split; "
            "valid: at most one shard a document"
        )
    to_batch = functools.partial(batch_of_rows, pad_id=tokenizer.pad_id)
    return RowsOfStreams(stream, rows, batch_size // shards).map(to_batch)


def heldout_batches(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    rows: Sequence[int],
    shuffle_window: int,
) -> grain.IterDataset:
    """One pass of packed batches, each held-out transition exactly once, or some rows of them.

    Every process packs all held-out documents and takes its rows of each batch. So all processes
    have equally many batches, as an evaluation step across processes needs, and the numbers do not
    depend on how many processes there are. The last batch is padded with rows of segment 0.

    Args and returns as for `train_batches`.
    """
    if isinstance(documents, StreamedDocuments):
        stream = documents
    else:
        stream = grain.MapDataset.source(documents).shuffle(_HELDOUT_SEED).to_iter_dataset(_READ)
    to_batch = functools.partial(batch_of_rows, pad_id=tokenizer.pad_id)
    packed = grain.experimental.WindowShuffleIterDataset(
        packed_rows(stream, tokenizer, seq_len), window_size=shuffle_window, seed=_HELDOUT_SEED
    )
    return _padded_batches(packed, batch_size, rows).map(to_batch)


def train_examples(
    examples: grain.MapDataset, *, batch_size: int, rows: Sequence[int], seed: int
) -> grain.IterDataset:
    """Endless batches of ready examples, shuffled anew each epoch, or some rows of them.

    Args:
      examples: random-access dicts of arrays of one shape, such as `pairs.encode_pair` makes.
      batch_size, rows, seed: as for `train_batches`.

    Returns:
      A dataset of stacked examples. Only those of the wanted rows are made.
    """
    example_seed, _ = _seeds(seed)
    endless = examples.shuffle(example_seed).repeat()
    return BatchesOfExamples(endless, rows, batch_size).to_iter_dataset(_READ)


def heldout_examples(
    examples: grain.MapDataset, *, batch_size: int, rows: Sequence[int], pad_id: int
) -> grain.IterDataset:
    """One pass over ready examples in a fixed order, shared out as by `heldout_batches`.

    `pad_id` fills the tokens of the rows that fill the last batch.
    """
    stream = examples.shuffle(_HELDOUT_SEED).to_iter_dataset(_READ)
    fill = functools.partial(_fill_padding, pad_id=pad_id)
    return _padded_batches(stream, batch_size, rows).map(fill)


def _padded_batches(
    stream: grain.IterDataset, batch_size: int, rows: Sequence[int]
) -> grain.IterDataset:
    """The wanted rows of each batch, the last batch padded with zeros."""
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    wanted = list(rows)
    return stream.batch(batch_size, batch_fn=pad).map(
        lambda batch: {field: array[wanted] for field, array in batch.items()}
    )


def _fill_padding(batch: dict[str, np.ndarray], pad_id: int) -> dict[str, np.ndarray]:
    """Writes `pad_id` into every field of tokens where the segment id of the same text is 0."""
    filled = {}
    for field in batch:
        if field.endswith("tokens"):
            is_text = batch[field.removesuffix("tokens") + "segment_ids"] > 0
            filled[field] = np.where(is_text, batch[field], np.int32(pad_id))
    return batch | filled


def _seeds(seed: int) -> tuple[int, int]:
    """Independent seeds for documents and rows. grain adds the epoch and the window to a seed, so
    seeds 0 and 1 used as they are would give one run the epochs of the other; 31 bits leave room
    for the sum."""
    document_seed, row_seed = np.random.SeedSequence(seed).generate_state(2) >> 1
    return int(document_seed), int(row_seed)
