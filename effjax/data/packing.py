"""From documents to packed rows: each transition of each document once, no position wasted.

A document `bos x1 ... xn eos` is the transitions (bos, x1), (x1, x2), ..., (xn, eos): an input and
its target. Rows are `seq_len` transitions: documents are laid end to end and cut where a row is
full, the rest going on in the next row. Packing transitions, and not tokens, is what makes the
count exact: a row of tokens would have to be cut so that one token at each cut is either seen twice
or never predicted, and its last token of each document would have no target.

The parts of documents in a row are numbered by `segment_ids` from 1 and have `positions` from 0, so
that a model neither attends across documents nor sees where in the row a document lies.
"""

from typing import Any

import grain
import numpy as np

from effjax.data.tokenizers import Tokenizer

_FEATURE = "transitions"


def transitions(document: bytes | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The (input, target) pairs of a document.

    The first token is predicted from bos, or from eos in a vocabulary without bos (a text then
    follows the end of the one before), and the end of the document is predicted as eos. With
    neither, the first token is an input only.

    Args:
      document: UTF-8 bytes, or token ids [n].
      tokenizer: encodes bytes; its vocabulary must hold the ids.

    Returns:
      int32 [m, 2]: inputs and targets. m = n + 1 for n tokens; n or n - 1 where eos or both are
      missing.

    Raises:
      ValueError: if an id is not in the vocabulary.
    """
    if isinstance(document, np.ndarray):
        check_ids(int(document.max(initial=0)), tokenizer)
        ids = document.astype(np.int32, copy=False)
    else:
        ids = tokenizer.encode(document)
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    before = [] if start is None else [start]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)])
    return np.stack([ids[:-1], ids[1:]], axis=1)


def check_ids(largest_id: int, tokenizer: Tokenizer) -> None:
    """Raises ValueError if ids up to `largest_id` do not fit the tokenizer's vocabulary."""
    if largest_id >= tokenizer.vocab_size:
        raise ValueError(
            f"data: the source has the id {largest_id}; valid: ids below {tokenizer.vocab_size}, "
            "the vocab_size of the tokenizer"
        )


def packed_rows(
    documents: grain.IterDataset, tokenizer: Tokenizer, seq_len: int
) -> grain.IterDataset:
    """Rows of `seq_len` transitions; the last row of a finite stream is padded.

    Returns:
      A dataset of dicts: transitions int32 [T, 2], transitions_segment_ids and
        transitions_positions int32 [T].
    """
    features = documents.map(lambda document: {_FEATURE: transitions(document, tokenizer)})
    features = features.filter(lambda feature: len(feature[_FEATURE]) > 0)
    return _PackedRows(
        grain.experimental.ConcatThenSplitIterDataset(features, length_struct={_FEATURE: seq_len})
    )


def batch_of_rows(rows: dict[str, np.ndarray], pad_id: int) -> dict[str, np.ndarray]:
    """The language-model batch of stacked rows.

    Args:
      rows: what `packed_rows` yields, stacked: transitions int32 [B, T, 2] and so on.
      pad_id: id written where the segment id is 0.

    Returns:
      tokens, targets, positions, segment_ids int32 [B, T] and loss_mask float32 [B, T], which is 1
      exactly where there is text: no transition crosses documents.
    """
    segment_ids = rows[f"{_FEATURE}_segment_ids"]
    is_text = segment_ids > 0
    filled = np.where(is_text[..., None], rows[_FEATURE], np.int32(pad_id))
    return {
        "tokens": np.ascontiguousarray(filled[..., 0]),
        "targets": np.ascontiguousarray(filled[..., 1]),
        "positions": rows[f"{_FEATURE}_positions"],
        "segment_ids": segment_ids,
        "loss_mask": is_text.astype(np.float32),
    }


class _PackedRows(grain.IterDataset):
    """grain's concat-then-split with a state that survives JSON.

    That iterator compares slices in its state with a tuple; read back from a JSON checkpoint they
    are lists, compare unequal, and the document that is next is lost.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRowsIterator(iter(self._parent))


class _PackedRowsIterator(grain.DatasetIterator):
    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {feature: tuple(part) for feature, part in state["remainder_slices"].items()}
        self._parent.set_state(state | {"remainder_slices": slices})
