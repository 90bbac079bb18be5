import numpy as np
import pytest
from table_model import TableModel, text_batch

from effjax import data
from effjax.evaluation.recall import distances, evaluate_recall

VOCAB = 17


def test_counts_are_those_of_a_loop(rng):
    table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    batches = [text_batch(rng, 3, 12, VOCAB), text_batch(rng, 2, 12, VOCAB)]
    for batch in batches:  # so that some answers are right
        right = table[batch["tokens"]].argmax(axis=-1)
        batch["targets"] = np.where(rng.random(right.shape) < 0.5, right, batch["targets"])
    found = evaluate_recall(TableModel(VOCAB), {"params": {"table": table}}, batches)
    correct, answers = np.zeros(12, int), np.zeros(12, int)
    for batch in batches:
        for row, at in zip(*np.nonzero(batch["loss_mask"]), strict=True):
            tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
            first = next(
                i for i in range(at + 1) if tokens[i] == tokens[at] and segments[i] == segments[at]
            )
            answers[at - first] += 1
            correct[at - first] += table[tokens[at]].argmax() == batch["targets"][row, at]
    np.testing.assert_array_equal(found.answers, answers)
    np.testing.assert_array_equal(found.correct, correct)
    assert found.accuracy == correct.sum() / answers.sum()
    binned = found.by_distance(4)
    assert binned["answers"].sum() == answers[1:].sum()


def test_distance_is_to_the_first_equal_token_of_the_segment():
    tokens = np.array([[5, 6, 5, 5, 6, 5]])
    segment_ids = np.array([[1, 1, 1, 1, 2, 2]])
    assert distances(tokens, segment_ids).tolist() == [[0, 0, 2, 3, 0, 0]]


def test_a_model_that_knows_nothing_is_at_chance():
    source = {
        "name": "associative_recall",
        "num_pairs": 4,
        "vocab_size": 64,
        "num_heldout_rows": 64,
    }
    config = {"source": source, "seq_len": 32, "batch_size": 32}
    batches = list(data.build(config, split="heldout"))
    zeros = {"params": {"table": np.zeros((260, 260), np.float32)}}
    found = evaluate_recall(TableModel(260), zeros, batches)
    assert found.answers.sum() == 64 * 4
    assert found.accuracy == 0  # every logit is equal, and the first token is never a value


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="loss_mask"):
        evaluate_recall(TableModel(VOCAB), {}, [])
