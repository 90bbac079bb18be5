"""Unigram and bigram byte models: what a language model must beat before it has learned anything.

Both work on the bytes of documents and do not cross from one document into the next. Their
smoothing:

- unigram: add-one, p(b) = (count(b) + 1) / (N + 256);
- bigram: interpolated with the unigram by one pseudo-count (a Dirichlet prior; Jurafsky and Martin,
  Speech and Language Processing, chapter 3), p(b | a) = (count(a b) + p(b)) / (count(a .) + 1). The
  first byte of a document has no byte before it and is predicted by the unigram.
"""

from collections.abc import Iterable

import numpy as np


def unigram_bits_per_byte(
    train_documents: Iterable[bytes], heldout_documents: Iterable[bytes]
) -> float:
    """Cross-entropy of held-out documents under the unigram model of the training documents.

    Returns:
      Bits a byte.

    Raises:
      ValueError: if the held-out documents have no bytes.
    """
    train, _ = _count(train_documents)
    heldout, _ = _count(heldout_documents)
    return float(-(heldout @ np.log2(_unigram(train))) / _total(heldout))


def bigram_bits_per_byte(
    train_documents: Iterable[bytes], heldout_documents: Iterable[bytes]
) -> float:
    """Cross-entropy of held-out documents under the bigram model of the training documents.

    Returns:
      Bits a byte.

    Raises:
      ValueError: if the held-out documents have no bytes.
    """
    train, train_pairs = _count(train_documents)
    heldout, heldout_pairs = _count(heldout_documents)
    unigram = _unigram(train)
    bigram = (train_pairs + unigram) / (train_pairs.sum(axis=1, keepdims=True) + 1.0)
    first = heldout - heldout_pairs.sum(axis=0)  # bytes that no byte of their document precedes
    bits = first @ np.log2(unigram) + np.sum(heldout_pairs * np.log2(bigram))
    return float(-bits / _total(heldout))


def _unigram(counts: np.ndarray) -> np.ndarray:
    return (counts + 1.0) / (counts.sum() + 256.0)


def _count(documents: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of bytes, int64 [256], and of neighbours in a document, int64 [256, 256]."""
    single = np.zeros(256, np.int64)
    double = np.zeros(256 * 256, np.int64)
    for document in documents:
        data = np.frombuffer(document, np.uint8)
        single += np.bincount(data, minlength=256)
        double += np.bincount(data[:-1].astype(np.uint16) << 8 | data[1:], minlength=256 * 256)
    return single, double.reshape(256, 256)


def _total(counts: np.ndarray) -> int:
    total = int(counts.sum())
    if not total:
        raise ValueError("heldout_documents have 0 bytes; valid: at least one byte")
    return total
