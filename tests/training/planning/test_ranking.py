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


AXES = ("pipeline", "data", "fsdp", "tensor", "expert")


def candidate(remat="none", accumulation_steps=1, num_microbatches=None, **mesh):
    return {
        "mesh": dict.fromkeys(AXES, 1) | mesh,
        "accumulation_steps": accumulation_steps,
        "num_microbatches": num_microbatches,
        "remat": remat,
    }


def test_candidates_use_all_chips_and_divide_the_batch(config):
    found = list(planning.candidates(config, "cpu"))
    for one in found:
        mesh = one["mesh"]
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["expert"] == 8
        rows = mesh["data"] * mesh["fsdp"] * mesh["expert"] * one["accumulation_steps"]
        assert config.data.batch_size % rows == 0
    assert candidate(fsdp=8, remat="full", accumulation_steps=2) in found
    assert candidate(data=2, tensor=4) in found
    assert all(one["mesh"]["expert"] == one["mesh"]["pipeline"] == 1 for one in found)
    keys = [json.dumps(one, sort_keys=True) for one in found]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("model", "fields", "stages"),
    [
        ("transformer", {"num_layers": 4}, {1, 2, 4}),
        ("transformer", {"num_layers": 4, "scan_layers": False}, {1}),
        ("transformer", {"num_layers": 5}, {1}),
        ("mor", {"num_layers": 8, "depth": {"num_recursions": 2, "sharing": "cycle"}}, {1, 2, 4}),
        ("mor", {"num_layers": 6, "depth": {"num_recursions": 3, "sharing": "sequence"}}, {1}),
    ],
)
def test_layers_that_divide_are_stages_too(model, fields, stages):
    """Each candidate is one that a run would take."""
    config = configs.default(model, **{"scan_layers": True} | fields)
    config.data.update(seq_len=16, batch_size=32)
    config = configs.resolve(config)
    found = list(planning.candidates(config, "cpu"))
    assert {one["mesh"]["pipeline"] for one in found} == stages
    piped = [one for one in found if one["mesh"]["pipeline"] > 1]
    if stages > {1}:
        assert candidate(pipeline=2, fsdp=4, num_microbatches=8, remat="full") in piped
        assert candidate(pipeline=2, fsdp=2, tensor=2, num_microbatches=16) in piped
    for one in piped:
        if one["remat"] == "dots":
            configs.check(
                config
                | {"mesh": config["mesh"] | one["mesh"]}
                | {"model": config["model"] | {"num_microbatches": one["num_microbatches"]}}
            )


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
