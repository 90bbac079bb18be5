import pytest

from effjax import data
from effjax.data import ngrams
from effjax.evaluation.baselines import ngram_baselines


@pytest.fixture
def config(tmp_path, rng):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(bytes(rng.integers(97, 105, 50).tolist()))
    source = {"name": "text", "paths": (str(tmp_path / "*.txt"),), "heldout_fraction": 0.4}
    return {"source": source}


def test_both_models_see_all_text_of_the_splits(config):
    train, heldout = (list(data.documents(config, split=s)) for s in ("train", "heldout"))
    assert ngram_baselines(config) == {
        "unigram": ngrams.unigram_bits_per_byte(train, heldout),
        "bigram": ngrams.bigram_bits_per_byte(train, heldout),
    }


def test_text_is_cut_after_whole_documents(config):
    train, heldout = (list(data.documents(config, split=s))[:2] for s in ("train", "heldout"))
    found = ngram_baselines(config, max_bytes=51)
    assert found["unigram"] == ngrams.unigram_bits_per_byte(train, heldout)
