"""Streams of batches: sharded, shuffled, repeated and batched on grain, for training and for
held-out evaluation.

Each function returns a `grain.IterDataset`; its iterator has `get_state` and `set_state`
(JSON-able), and a restored iterator yields the very next batch, bit for bit. Order depends on the
seed and on nothing else.
"""

import functools

import grain
import numpy as np

from effjax.data.packing import batch_of_rows, packed_rows
from effjax.data.sources import Documents, StreamedDocuments
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
    seed: int,
    shuffle_window: int,
    shard_index: int,
    shard_count: int,
) -> grain.IterDataset:
    """Endless packed batches of one process.

    Each process reads only its share of the documents. Documents come in another order each epoch;
    packed rows are then shuffled within windows, so that a batch is not made of neighbouring pieces
    of one long document.

    Args:
      documents: random-access documents, or a stream (which keeps its own order).
      tokenizer: encodes documents of bytes.
      seq_len: T, positions a row.
      batch_size: B, rows a batch of this process.
      seed: of both shuffles.
      shuffle_window: rows in a window.
      shard_index: which process this is.
      shard_count: how many there are.

    Returns:
      A dataset of batches as `packing.batch_of_rows` describes, all positions filled.

    Raises:
      ValueError: if there are fewer documents than processes.
    """
    document_seed, row_seed = _seeds(seed)
    if isinstance(documents, StreamedDocuments):
        stream = grain.experimental.RepeatIterDataset(documents.shard(shard_index, shard_count))
    else:
        documents = grain.MapDataset.source(documents)
        stream = _repeated(documents, document_seed, shard_index, shard_count)
    rows = packed_rows(stream, tokenizer, seq_len)
    rows = grain.experimental.WindowShuffleIterDataset(
        rows, window_size=shuffle_window, seed=row_seed
    )
    to_batch = functools.partial(batch_of_rows, pad_id=tokenizer.pad_id)
    return rows.batch(batch_size).map(to_batch)


def heldout_batches(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    shuffle_window: int,
    shard_index: int,
    shard_count: int,
) -> grain.IterDataset:
    """One pass of packed batches, each held-out transition exactly once.

    Every process packs all held-out documents and takes its part of each global batch. So all
    processes have equally many batches, as an evaluation step across processes needs, and the
    numbers do not depend on how many processes there are. The last global batch is padded with rows
    of segment 0.

    Args and returns as for `train_batches`.
    """
    if isinstance(documents, StreamedDocuments):
        stream = documents
    else:
        stream = grain.MapDataset.source(documents).shuffle(_HELDOUT_SEED).to_iter_dataset(_READ)
    to_batch = functools.partial(batch_of_rows, pad_id=tokenizer.pad_id)
    rows = packed_rows(stream, tokenizer, seq_len)
    rows = grain.experimental.WindowShuffleIterDataset(
        rows, window_size=shuffle_window, seed=_HELDOUT_SEED
    )
    return _share_of_padded_batches(rows, batch_size, shard_index, shard_count).map(to_batch)


def train_examples(
    examples: grain.MapDataset, *, batch_size: int, seed: int, shard_index: int, shard_count: int
) -> grain.IterDataset:
    """Endless batches of one process out of ready examples, shuffled anew each epoch.

    Args:
      examples: random-access dicts of arrays of one shape, such as `pairs.encode_pair` makes.
      batch_size, seed, shard_index, shard_count: as for `train_batches`.

    Returns:
      A dataset of stacked examples.
    """
    document_seed, _ = _seeds(seed)
    return _repeated(examples, document_seed, shard_index, shard_count).batch(batch_size)


def heldout_examples(
    examples: grain.MapDataset,
    *,
    batch_size: int,
    pad_id: int,
    shard_index: int,
    shard_count: int,
) -> grain.IterDataset:
    """One pass over ready examples in a fixed order, shared out as by `heldout_batches`.

    `pad_id` fills the tokens of the rows that fill the last batch.
    """
    stream = examples.shuffle(_HELDOUT_SEED).to_iter_dataset(_READ)
    fill = functools.partial(_fill_padding, pad_id=pad_id)
    return _share_of_padded_batches(stream, batch_size, shard_index, shard_count).map(fill)


def _repeated(
    documents: grain.MapDataset, seed: int, shard_index: int, shard_count: int
) -> grain.IterDataset:
    if len(documents) < shard_count:
        raise ValueError(
            f"shard_count is {shard_count}, with {len(documents)} document(s) in the train split; "
            "valid: at least one document for each process"
        )
    share = documents[shard_index::shard_count]
    return share.shuffle(seed).repeat().to_iter_dataset(_READ)


def _share_of_padded_batches(
    rows: grain.IterDataset, batch_size: int, shard_index: int, shard_count: int
) -> grain.IterDataset:
    """This process's rows of the batches over all processes, the last of them padded with zeros."""
    size = batch_size * shard_count
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=size)
    own = slice(shard_index * batch_size, (shard_index + 1) * batch_size)
    return rows.batch(size, batch_fn=pad).map(lambda batch: {k: v[own] for k, v in batch.items()})


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
