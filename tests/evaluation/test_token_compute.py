import collections

import numpy as np
from table_model import TableModel, text_batch

from effjax.data.tokenizers import ByteTokenizer
from effjax.evaluation.forward import compile_forward, inputs_of
from effjax.evaluation.token_compute import measure_token_compute

VOCAB = 260


def measure(batches, **options):
    variables = {"params": {"table": np.zeros((VOCAB, VOCAB), np.float32)}}
    forward = compile_forward(TableModel(VOCAB), variables, inputs_of(batches[0]))
    return measure_token_compute(forward, variables, batches, ByteTokenizer(), **options)


def test_counts_tokens_that_are_not_padding(rng):
    batches = [text_batch(rng, 3, 10, VOCAB, padded_rows=1) for _ in range(2)]
    found = measure(batches)
    assert set(found) == {"depth"}
    texts = [batch["tokens"][batch["segment_ids"] > 0] for batch in batches]
    expected = collections.Counter((np.concatenate(texts) % 3 + 1.0).tolist())
    assert found["depth"].counts == expected
    assert found["depth"].mean == np.mean(np.concatenate(texts) % 3 + 1.0)


def test_passages_are_documents_with_a_number_for_each_token(rng):
    batch = text_batch(rng, 2, 10, VOCAB)
    passages = measure([batch])["depth"].passages
    documents = [
        batch["tokens"][row, batch["segment_ids"][row] == segment]
        for row in range(2)
        for segment in (1, 2)
    ]
    assert len(passages) == len(documents)
    for passage, tokens in zip(passages, documents, strict=True):
        assert b"".join(passage.pieces) == bytes(tokens[tokens < 256].tolist())
        np.testing.assert_array_equal(passage.values, tokens % 3 + 1)


def test_text_is_kept_only_as_far_as_asked(rng):
    batches = [text_batch(rng, 2, 10, VOCAB) for _ in range(3)]
    found = measure(batches, max_passage_tokens=1)["depth"]
    assert len(found.passages) == 4  # of the first batch
    assert sum(found.counts.values()) == sum(np.count_nonzero(b["segment_ids"]) for b in batches)
