"""Packing against a slow reference in plain Python lists, and the properties a batch promises."""

import dataclasses
import itertools

import grain
import numpy as np
import pytest

from effjax.data.packing import batch_of_rows, packed_rows, transitions
from effjax.data.tokenizers import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class OtherEnds(ByteTokenizer):
    """Bytes with other ends of a document."""

    bos_id: int | None = None
    eos_id: int | None = None


def reference_rows(documents, tokenizer, seq_len):
    """Rows of (token, target, position, segment), one token at a time."""
    rows, row, segment = [], [], 0
    for document in documents:
        ids = [tokenizer.bos_id, *document, tokenizer.eos_id]
        segment, position = segment + 1, 0
        for token, target in itertools.pairwise(ids):
            if len(row) == seq_len:
                rows.append(row)
                row, segment, position = [], 1, 0
            row.append((token, target, position, segment))
            position += 1
    padding = (tokenizer.pad_id, tokenizer.pad_id, 0, 0)
    return [*rows, row + [padding] * (seq_len - len(row))]


def pack(documents, tokenizer, seq_len):
    stream = grain.MapDataset.source(documents).to_iter_dataset()
    rows = list(packed_rows(stream, tokenizer, seq_len))
    stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return batch_of_rows(stacked, tokenizer.pad_id)


@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_rows_equal_the_reference(seq_len, rng):
    documents = [rng.bytes(int(n)) for n in rng.integers(1, 200, 40)]
    documents += [rng.bytes(seq_len - 1), rng.bytes(seq_len)]  # that end at the end of a row
    tokenizer = ByteTokenizer()
    batch = pack(documents, tokenizer, seq_len)
    expected = np.array(reference_rows(documents, tokenizer, seq_len))
    for index, field in enumerate(("tokens", "targets", "positions", "segment_ids")):
        assert batch[field].dtype == np.int32
        np.testing.assert_array_equal(batch[field], expected[..., index], err_msg=field)
    assert batch["loss_mask"].dtype == np.float32
    np.testing.assert_array_equal(batch["loss_mask"], expected[..., 3] > 0)


def test_every_target_follows_its_token_in_its_document(rng):
    documents = [rng.bytes(int(n)) for n in rng.integers(1, 100, 30)]
    tokenizer = ByteTokenizer()
    batch = pack(documents, tokenizer, 32)
    whole = [np.array([257, *d, 258]).astype(np.int32).tobytes() for d in documents]
    for tokens, targets, positions, segments in zip(
        *(batch[f] for f in ("tokens", "targets", "positions", "segment_ids")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            part = np.append(tokens[inside], targets[inside][-1])
            np.testing.assert_array_equal(part[1:], targets[inside])
            assert any(part.tobytes() in document for document in whole)
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))


def test_no_position_is_wasted(rng):
    documents = [rng.bytes(int(n)) for n in rng.integers(1, 500, 50)]
    batch = pack(documents, ByteTokenizer(), 128)
    assert batch["loss_mask"][:-1].mean() == 1.0  # all rows but the last are full
    assert batch["loss_mask"].sum() == sum(len(d) + 1 for d in documents)


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (257, 258, [(257, 5), (5, 6), (6, 258)]),
        (None, 258, [(258, 5), (5, 6), (6, 258)]),
        (257, None, [(257, 5), (5, 6)]),
        (None, None, [(5, 6)]),
    ],
)
def test_ends_of_a_document(bos, eos, expected):
    tokenizer = OtherEnds(bos_id=bos, eos_id=eos)
    assert transitions(bytes([5, 6]), tokenizer).tolist() == [list(pair) for pair in expected]


def test_a_document_without_transitions_takes_no_segment():
    batch = pack([b"a", b"bc", b"", b"de"], OtherEnds(), 4)
    assert batch["segment_ids"].tolist() == [[1, 2, 0, 0]]
    assert batch["tokens"].tolist() == [[*b"bd", 256, 256]]


def test_ids_outside_the_vocabulary():
    with pytest.raises(ValueError, match="has the id 260; valid: ids below 260"):
        transitions(np.array([1, 260]), ByteTokenizer())
