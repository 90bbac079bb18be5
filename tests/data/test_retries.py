"""A source that fails for a while is tried again; one that fails for good is one clear error."""

import dataclasses
import itertools

import numpy as np
import pytest

from effjax import data
from effjax.data.retries import DataSourceError, Patience
from effjax.data.sources import TextFiles
from effjax.registry import register

FAILURES = {"left": 0, "seen": 0}


class Flaky:
    """Documents of which every third is hard to read while there are failures left."""

    def __init__(self, documents):
        self._documents = documents

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, index):
        if index % 3 == 0 and FAILURES["left"]:
            FAILURES["left"] -= 1
            FAILURES["seen"] += 1
            raise ConnectionResetError(104, "Connection reset by peer")
        return self._documents[index]


@register("source", "test_flaky")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlakyFiles(TextFiles):
    """Text files on a bad disk."""

    def documents(self, split):
        return Flaky(super().documents(split))


def tokens(config, count=30):
    iterator = data.build(config, split="train")
    try:
        return [batch["tokens"].tolist() for batch in itertools.islice(iterator, count)]
    finally:
        iterator.close()


def config(tmp_path, name, **changes):
    source = {"name": name, "paths": str(tmp_path / "*.txt"), "heldout_fraction": 0.3}
    return {"source": source, "seq_len": 32, "batch_size": 4, "shuffle_window": 8, **changes}


def test_failures_in_between_change_nothing(corpus, tmp_path, caplog):
    corpus(20)
    FAILURES.update(left=5, seen=0)
    found = tokens(config(tmp_path, "test_flaky", retries=5, retry_seconds=0.0))
    assert FAILURES["seen"] == 5
    assert found == tokens(config(tmp_path, "text"))
    assert "retry 1 of 5 in 0 s" in caplog.text
    assert "Connection reset by peer" in caplog.text


@pytest.mark.parametrize("prefetch", [0, 2])
def test_failing_for_good_is_one_error(corpus, tmp_path, prefetch):
    corpus(20)
    FAILURES.update(left=10**6, seen=0)
    broken = config(tmp_path, "test_flaky", retries=2, retry_seconds=0.001, prefetch=prefetch)
    with pytest.raises(DataSourceError) as error:
        tokens(broken)
    for part in ("of source test_flaky could not be read in 3 tries", "reset", "data.retries"):
        assert part in str(error.value)
    assert FAILURES["seen"] == 3


def test_waits_double(monkeypatch, rng):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    first = float(rng.uniform(1, 2))

    def fails():
        raise TimeoutError

    with pytest.raises(DataSourceError, match=r"x could not be read in 5 tries \(TimeoutError"):
        Patience(4, first).call(fails, "x")
    np.testing.assert_allclose(waited, first * np.array([1, 2, 4, 8]))


def test_a_bug_is_not_tried_again():
    calls = []

    def wrong():
        calls.append(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        Patience(5, 0.0).call(wrong, "x")
    assert len(calls) == 1


class BreakingStream:
    """What StreamedDocuments uses of `datasets.IterableDataset`; its iterators break after some examples."""

    def __init__(self, texts, lengths):
        self._texts, self._lengths, self._position = texts, iter(lengths), 0

    def __deepcopy__(self, memo):
        return self

    def __iter__(self):
        for _ in range(next(self._lengths)):
            if self._position == len(self._texts):
                return
            self._position += 1
            yield {"text": self._texts[self._position - 1]}
        raise ConnectionError("lost")

    def state_dict(self):
        return self._position

    def load_state_dict(self, state):
        self._position = state


def test_a_stream_is_opened_again_where_it_broke():
    from effjax.data.sources import StreamedDocuments

    texts = [str(number) for number in range(10)]
    stream = BreakingStream(texts, [3, 0, 2, 100])
    documents = StreamedDocuments(stream, "text", "train", None)
    assert list(documents.patient(Patience(2, 0.0))) == [text.encode() for text in texts]
    broken = StreamedDocuments(BreakingStream(texts, [3, 0, 0, 0]), "text", "train", None)
    with pytest.raises(
        DataSourceError, match=r"stream of source 'hf' could not be read in 3 tries"
    ):
        list(broken.patient(Patience(2, 0.0)))
