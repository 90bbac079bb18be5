"""Batches of (query, document) pairs for embedders."""

import numpy as np

from effjax.data.sources import Pair
from effjax.data.tokenizers import Tokenizer


def encode_pair(pair: Pair, *, tokenizer: Tokenizer, seq_len: int) -> dict[str, np.ndarray]:
    """The token ids of a pair, each side cut to `seq_len` tokens and padded to it.

    Neither bos nor eos is added: an embedder pools over the text.

    Returns:
      query_tokens, query_segment_ids, document_tokens, document_segment_ids, int32 [T]; the segment
      id is 1 for text and 0 for padding.
    """
    row = {}
    for side, text in (("query", pair.query), ("document", pair.document)):
        ids = tokenizer.encode(text)[:seq_len]
        tokens = np.full(seq_len, tokenizer.pad_id, np.int32)
        tokens[: len(ids)] = ids
        row[f"{side}_tokens"] = tokens
        row[f"{side}_segment_ids"] = (np.arange(seq_len) < len(ids)).astype(np.int32)
    return row
