"""What a language model has to beat: n-gram models of bytes, fitted on the same training text."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from effjax import data
from effjax.data import ngrams

# Counts of bytes and pairs of bytes settle long before this; more text would only take longer.
MAX_BYTES = 32_000_000


def ngram_baselines(config: Mapping[str, Any], max_bytes: int = MAX_BYTES) -> dict[str, float]:
    """Held-out bits per byte of a unigram and a bigram byte model.

    Args:
      config: the data section of a config.
      max_bytes: text of each split that is looked at, cut after a whole document.

    Returns:
      Bits per byte under "unigram" and "bigram".

    Raises:
      ValueError: if the held-out split has no text.
    """
    train, heldout = (
        list(_first_bytes(data.documents(config, split=split), max_bytes))
        for split in ("train", "heldout")
    )
    return {
        "unigram": ngrams.unigram_bits_per_byte(train, heldout),
        "bigram": ngrams.bigram_bits_per_byte(train, heldout),
    }


def _first_bytes(documents: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= max_bytes:
            return
