"""A search plans each candidate once, ranks them, and goes on where it was interrupted."""

import json

import pytest

from effjax.training import config as configs
from effjax.training import planning


@pytest.fixture
def config():
    config = configs.default("transformer", d_model=16, num_layers=1)
    config.data.update(seq_len=16, batch_size=16)
    return config


def candidate(remat="none", accumulation_steps=1, **mesh):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | mesh
    return {"mesh": sizes, "accumulation_steps": accumulation_steps, "remat": remat}


def test_candidates_use_all_chips_and_divide_the_batch(config):
    found = list(planning.candidates(config, "cpu"))
    for one in found:
        mesh = one["mesh"]
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["expert"] == 8
        rows = mesh["data"] * mesh["fsdp"] * mesh["expert"] * one["accumulation_steps"]
        assert config.data.batch_size % rows == 0
    assert candidate(fsdp=8, remat="full", accumulation_steps=2) in found
    assert candidate(data=2, tensor=4) in found
    assert all(one["mesh"]["expert"] == 1 for one in found)
    keys = [json.dumps(one, sort_keys=True) for one in found]
    assert len(set(keys)) == len(keys)


def test_experts_are_split_where_there_are_any(config):
    mixture = configs.default("switch", ffn={"num_experts": 4})
    mixture.data.batch_size = 16
    sizes = {one["mesh"]["expert"] for one in planning.candidates(mixture, "cpu")}
    assert sizes == {1, 2, 4}


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_interrupted(config, tmp_path):
    path = tmp_path / "search.json"
    first, second = candidate(data=8), candidate(data=8, remat="full")
    (alone,) = planning.search(config, "cpu", path, [first])
    both = planning.search(config, "cpu", path, [first, second])
    assert [row for row in both if row["settings"]["remat"] == "none"] == [alone]
    assert {row["settings"]["remat"] for row in both} == {"none", "full"}
    # Nothing is known of a CPU's speed, so what takes less memory is first; and nothing is left to compile.
    totals = [row["memory"]["total"] for row in both]
    assert totals == sorted(totals)
    assert planning.search(config, "cpu", path, [first, second]) == both

    config.optimizer.b2 = 0.9
    with pytest.raises(ValueError, match="of a search for another config"):
        planning.search(config, "cpu", path, [first])
