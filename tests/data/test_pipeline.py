"""The stream of batches: deterministic, resumable to the bit, sharded without loss, fast."""

import itertools
import json
import subprocess
import sys
import time

import grain
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest

from effjax import data
from effjax.data.associative_recall import AssociativeRecall


def text_config(tmp_path, **changes):
    return {
        "source": {"name": "text", "paths": str(tmp_path / "*.txt"), "heldout_fraction": 0.3},
        "seq_len": 32,
        "batch_size": 4,
        "shuffle_window": 64,
        **changes,
    }


def first(count, config, **options):
    return list(itertools.islice(data.build(config, split="train", **options), count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for field in batch:
            np.testing.assert_array_equal(batch[field], other[field], err_msg=field)


def same(batch, other):
    return np.array_equal(batch["tokens"], other["tokens"])


def document_bytes(batches):
    """The documents of a stream of rows in order, each from its bos on; the last may be cut."""
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    starts = np.flatnonzero(tokens == 257)
    return [bytes(part[1:].astype(np.uint8)) for part in np.split(tokens, starts)[1:]]


def test_batch_fields(corpus, tmp_path):
    corpus(20)
    (batch,) = first(1, text_config(tmp_path))
    types = {field: (array.shape, array.dtype) for field, array in batch.items()}
    assert types == {
        "tokens": ((4, 32), np.int32),
        "targets": ((4, 32), np.int32),
        "positions": ((4, 32), np.int32),
        "segment_ids": ((4, 32), np.int32),
        "loss_mask": ((4, 32), np.float32),
    }
    assert all(array.flags.c_contiguous for array in batch.values())


def test_a_seed_fixes_the_order(corpus, tmp_path):
    corpus(30)
    batches = first(40, text_config(tmp_path, seed=3))
    assert_same(batches, first(40, text_config(tmp_path, seed=3, prefetch=0)))
    assert not same(batches[0], first(1, text_config(tmp_path, seed=4))[0])


def test_training_rows_are_all_full(corpus, tmp_path):
    corpus(30)
    assert all(batch["loss_mask"].all() for batch in first(64, text_config(tmp_path)))


def test_rows_are_shuffled(corpus, tmp_path):
    corpus(30)
    in_order = first(16, text_config(tmp_path, shuffle_window=1))
    shuffled = first(16, text_config(tmp_path, shuffle_window=64))
    assert not same(in_order[0], shuffled[0])
    rows = [sorted(row.tobytes() for b in batches for row in b["tokens"])
            for batches in (in_order, shuffled)]  # fmt: skip
    assert rows[0] == rows[1]  # a window of 64 rows is 16 batches of 4


def test_each_epoch_has_every_document_in_another_order(corpus, tmp_path):
    texts = corpus(20)
    config = text_config(tmp_path, shuffle_window=1)
    train = list(data.documents(config, split="train"))
    count = len(train)
    assert 5 < count < len(texts)
    batches_an_epoch = sum(len(t) + 1 for t in train) / (4 * 32)
    found = document_bytes(first(int(3 * batches_an_epoch) + 2, config))
    epochs = [found[n * count : (n + 1) * count] for n in range(3)]
    assert all(sorted(epoch) == sorted(train) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_three_processes_read_every_training_document_once(corpus, tmp_path):
    corpus(40)
    config = text_config(tmp_path, shuffle_window=1, batch_size=6, shards=3)
    train = list(data.documents(config, split="train"))
    seen = []
    for shard in range(3):
        share = set(train[shard::3])
        batches = first(100, config, rows=(2 * shard, 2 * shard + 1))
        assert batches[0]["tokens"].shape == (2, 32)
        documents = document_bytes(batches)[:-1]  # the last may be cut
        assert share.issuperset(documents)
        seen += documents[: len(share)]  # one epoch of this process
    assert sorted(seen) == sorted(train)


@pytest.mark.parametrize("shards", [1, 2, 6])
def test_a_row_does_not_depend_on_which_others_are_made(corpus, tmp_path, rng, shards):
    corpus(40)
    config = text_config(tmp_path, batch_size=6, shards=shards)
    whole = first(20, config)
    owner = rng.permutation([0, 0, 1, 1, 2, 2])
    for process in range(3):
        rows = np.flatnonzero(owner == process)
        own = [{field: array[rows] for field, array in batch.items()} for batch in whole]
        assert_same(first(20, config, rows=rows.tolist()), own)


def test_rows_of_examples_do_not_depend_on_which_others_are_made():
    task = AssociativeRecall(num_pairs=4, vocab_size=32, num_rows=50)
    config = {"source": task, "seq_len": 24, "batch_size": 4}
    parts = [first(30, config, rows=rows) for rows in ([0, 3], [1], [2])]
    for batch, a, b, c in zip(first(30, config), *parts, strict=True):  # more than two epochs
        tokens = [a["tokens"][0], b["tokens"][0], c["tokens"][0], a["tokens"][1]]
        np.testing.assert_array_equal(batch["tokens"], tokens)


@pytest.mark.parametrize("source", ["text", "rows"])
def test_other_processes_go_on_where_some_have_stopped(corpus, tmp_path, source):
    """Two processes save after 7 batches, and three go on."""
    corpus(40)
    config = text_config(tmp_path, batch_size=6, shards=6)
    if source == "rows":
        config["source"] = AssociativeRecall(num_pairs=4, vocab_size=32, num_rows=50)
    states = []
    for rows in (range(4), range(2, 6)):  # some rows are made by both
        iterator = data.build(config, split="train", rows=rows)
        for _ in range(7):
            next(iterator)
        states.append(json.loads(json.dumps(iterator.get_state())))
    state = data.joined_state(states)
    whole = first(20, config)[7:]
    for rows in ([0, 1], [2, 3], [4, 5]):
        iterator = data.build(config, split="train", rows=rows)
        iterator.set_state(state)
        own = [{field: array[rows] for field, array in batch.items()} for batch in whole]
        assert_same(list(itertools.islice(iterator, 13)), own)
    next(iterator)
    with pytest.raises(ValueError, match="states of data differ"):
        data.joined_state([state, iterator.get_state()])


def test_heldout_is_one_fixed_pass_with_every_byte_once(corpus, tmp_path):
    corpus(40)
    heldout = list(data.documents(text_config(tmp_path), split="heldout"))
    passes = [list(data.build(text_config(tmp_path, seed=s), split="heldout")) for s in (0, 1)]
    assert_same(*passes)
    assert {batch["tokens"].shape for batch in passes[0]} == {(4, 32)}
    mask = np.concatenate([batch["loss_mask"].ravel() for batch in passes[0]]) > 0
    targets = np.concatenate([batch["targets"].ravel() for batch in passes[0]])
    assert mask.sum() == sum(len(document) + 1 for document in heldout)
    found = bytes(targets[mask & (targets < 256)].astype(np.uint8))
    assert sorted(found) == sorted(b"".join(heldout))
    segments = np.concatenate([batch["segment_ids"].ravel() for batch in passes[0]])
    np.testing.assert_array_equal(mask, segments > 0)
    assert (targets[~mask] == data.tokenizer({}).pad_id).all()


def test_heldout_batches_do_not_depend_on_the_number_of_processes(corpus, tmp_path):
    corpus(40)
    config = text_config(tmp_path, batch_size=6)
    alone = list(data.build(config, split="heldout"))
    shares = [list(data.build(config, split="heldout", rows=(2 * i, 2 * i + 1))) for i in range(3)]
    joined = [
        {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(alone, joined)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restored_iterator_goes_on_with_the_very_next_batch(corpus, tmp_path, prefetch):
    size = sum(len(text) + 1 for text in corpus(20).values())
    config = text_config(tmp_path, prefetch=prefetch)
    count = 3 * size // (4 * 32)  # more than three epochs
    iterator, batches, states = data.build(config, split="train"), [], []
    for _ in range(count):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    used = data.build(config, split="train")  # restored many times, forwards and backwards
    for step in (0, 1, 16, count - 3, count // 2, 0):  # a window ends after 16
        used.set_state(json.loads(states[step]))
        fresh = data.build(config, split="train")
        fresh.set_state(json.loads(states[step]))
        expected = batches[step : step + 3]
        assert_same(list(itertools.islice(used, len(expected))), expected)
        assert_same(list(itertools.islice(fresh, len(expected))), expected)


def test_heldout_resumes_too(corpus, tmp_path):
    corpus(40)
    config = text_config(tmp_path)
    iterator = data.build(config, split="heldout")
    next(iterator), next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = data.build(config, split="heldout")
    resumed.set_state(state)
    assert_same(list(resumed), list(iterator))


def test_state_in_an_orbax_checkpoint(corpus, tmp_path):
    corpus(20)
    config = text_config(tmp_path)
    iterator = data.build(config, split="train")
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        resumed = data.build(config, split="train")
        restore = grain.checkpoint.CheckpointRestore(resumed)
        manager.restore(5, args=ocp.args.Composite(data=restore))
    following = list(itertools.islice(iterator, 10))
    assert_same(list(itertools.islice(resumed, 10)), following)


def test_generated_rows_are_batched_shuffled_and_resumable():
    task = AssociativeRecall(num_pairs=4, vocab_size=32, num_rows=50, num_heldout_rows=7)
    config = {"source": task, "seq_len": 24, "batch_size": 4}
    rows = task.rows("train", 24)
    known = {rows[index]["tokens"].tobytes() for index in range(50)}
    iterator = data.build(config, split="train")
    batches = list(itertools.islice(iterator, 12))
    seen = [row.tobytes() for batch in batches for row in batch["tokens"]]
    assert known.issuperset(seen)
    assert len(set(seen)) == 48  # no row twice in an epoch
    resumed = data.build(config, split="train")
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    assert_same([next(resumed)], [next(iterator)])
    heldout = list(data.build(config, split="heldout"))
    masks = np.concatenate([batch["segment_ids"] for batch in heldout]).any(axis=1)
    assert masks.tolist() == [True] * 7 + [False]
    assert (heldout[1]["tokens"][3] == 256).all()


def test_defaults_are_the_whole_config():
    config = data.default_config()
    assert config["source"] == {"name": "stdlib", "heldout_fraction": 0.1}
    assert config["tokenizer"] == {"name": "bytes"}
    assert json.loads(json.dumps(config)) == config
    assert_same(first(2, {}), first(2, ml_collections.ConfigDict(config)))


def test_throughput_of_the_default_source():
    iterator = data.build({"batch_size": 32}, split="train")
    next(iterator)
    start, count = time.process_time(), 300
    for _ in range(count):
        next(iterator)
    rate = count * 32 * 256 / (time.process_time() - start)
    print(f"{rate / 1e6:.2f} M tokens/s of CPU time")
    assert rate > 5e5  # some 3e6 on a 2020s core: a tenth of the work of any model


def test_a_program_may_end_while_batches_are_made():
    program = "from effjax import data; next(data.build({}, split='train'))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
