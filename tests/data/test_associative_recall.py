import numpy as np
import pytest

from effjax import registry
from effjax.data.associative_recall import AssociativeRecall


@pytest.fixture
def seed(rng) -> int:
    return int(rng.integers(2**31))


TASKS = [
    {"num_pairs": 4},
    {"num_pairs": 8, "num_queries": 3, "vocab_size": 64, "power_a": 1.0},
    {"num_pairs": 16, "vocab_size": 32},  # every key and every value is used
    {"num_pairs": 1, "vocab_size": 1024},
]


@pytest.mark.parametrize("fields", TASKS)
@pytest.mark.parametrize("seq_len", [64, 65])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_context_determines_every_answer(seed, fields, seq_len, split):
    task = AssociativeRecall(**fields, seed=seed)
    rows = task.rows(split, seq_len)
    for i in range(30):
        row = rows[i]
        tokens, targets = row["tokens"].tolist(), row["targets"].tolist()
        asked = np.flatnonzero(row["loss_mask"])
        assert len(asked) == task.queries
        context = 2 * task.num_pairs
        table = dict(zip(tokens[:context:2], tokens[1:context:2], strict=True))
        assert len(table) == len(set(table.values())) == task.num_pairs
        assert all(
            key < task.vocab_size // 2 <= value < task.vocab_size for key, value in table.items()
        )
        assert (asked >= context).all()
        assert len({tokens[t] for t in asked}) == task.queries
        for t in asked:
            assert targets[t] == table[tokens[t]]
        # A key stands where it is defined and where it is asked for, and nowhere else.
        assert {t for t in range(seq_len) if tokens[t] in table} == {*range(0, context, 2), *asked}


def test_answers_are_not_written_behind_their_queries(seed):
    """What follows a query is filler, which is the answer no more often than any other token."""
    rows = AssociativeRecall(num_pairs=8, vocab_size=64, seed=seed).rows("train", 65)
    given = [
        row["tokens"][1:][row["loss_mask"][:-1] > 0]
        == row["targets"][:-1][row["loss_mask"][:-1] > 0]
        for row in (rows[i] for i in range(200))
    ]
    assert np.mean(np.concatenate(given)) < 0.05  # 1 / 56 expected of 1600


@pytest.mark.parametrize("fields", TASKS)
def test_rows_have_the_form_of_language_model_rows(seed, fields):
    row = AssociativeRecall(**fields, seed=seed).rows("train", 64)[5]
    between = row["loss_mask"][:-1] == 0
    np.testing.assert_array_equal(row["tokens"][1:][between], row["targets"][:-1][between])
    np.testing.assert_array_equal(row["positions"], np.arange(64))
    np.testing.assert_array_equal(row["segment_ids"], 1)
    assert {v.shape for v in row.values()} == {(64,)}
    assert row["loss_mask"].dtype == np.float32
    assert {v.dtype for k, v in row.items() if k != "loss_mask"} == {np.dtype("int32")}


def test_rows_depend_on_seed_and_index_only(seed):
    first, again = (AssociativeRecall(seed=seed).rows("train", 48) for _ in range(2))
    other = AssociativeRecall(seed=seed + 1).rows("train", 48)
    for i in (7, 3, 99_999):
        row = first[i]
        for name, value in again[i].items():
            np.testing.assert_array_equal(row[name], value)
        assert (row["tokens"] != other[i]["tokens"]).any()
        assert (row["tokens"] != first[i - 1]["tokens"]).any()


def test_no_table_of_pairs_is_in_both_splits(seed):
    # So few tables (4 * 3 * 4 * 3 with two pairs) that independent draws would share nearly all of them.
    task = AssociativeRecall(num_pairs=2, vocab_size=8, num_heldout_rows=400, seed=seed)
    tables = {
        split: {tuple(task.rows(split, 16)[i]["tokens"][:4].tolist()) for i in range(400)}
        for split in ("train", "heldout")
    }
    assert not tables["train"] & tables["heldout"]
    assert min(map(len, tables.values())) > 30


def test_slots_follow_the_power_law(seed):
    """With one query, the slot has probability proportional to slot^(power_a - 1)."""
    for power_a in (0.01, 1.0):
        rows = AssociativeRecall(num_pairs=1, power_a=power_a, seed=seed).rows("train", 18)
        slots = [(int(np.argmax(rows[i]["loss_mask"])) - 2) // 2 for i in range(800)]
        expected = np.arange(1, 9) ** (power_a - 1)
        expected = 800 * expected / expected.sum()
        counts = np.bincount(slots, minlength=8)
        # Five standard deviations of a binomial count, for each of eight slots.
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all(), (counts, expected)


def test_row_out_of_range():
    rows = AssociativeRecall(num_heldout_rows=3).rows("heldout", 64)
    assert len(rows) == 3
    assert len(list(rows)) == 3
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows[3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_pairs": 0}, "num_pairs is 0; valid: 1 or more"),
        ({"num_queries": 9}, "num_queries is 9; valid: 1 to num_pairs=8, or None"),
        (
            {"vocab_size": 14},
            "vocab_size is 14; valid: an even number, at least 2 \\* num_pairs = 16",
        ),
        ({"vocab_size": 17}, "vocab_size is 17"),
        ({"power_a": 0.0}, "power_a is 0.0; valid: a positive number"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.build("source", {"name": "associative_recall"} | fields)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"seq_len is 31; valid: at least 2 .* = 32"):
        AssociativeRecall().rows("train", 31)
    with pytest.raises(ValueError, match="split is 'test'"):
        AssociativeRecall().rows("test", 64)
