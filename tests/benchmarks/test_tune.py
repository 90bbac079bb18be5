"""The tuner: its search, its log, what it writes, and one run of it with the real compiler."""

import dataclasses
import functools
import io
import json
import math

import pytest
from rich.console import Console

from benchmarks.kernels import tune
from benchmarks.kernels.case import BOTH, FORWARD, Contender
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.costs import Device, absent, present
from benchmarks.kernels.schedules import Compiler
from benchmarks.kernels.search import search
from pallas_kernels import selective_scan, topology
from pallas_kernels.attention.blocks import TABLE
from pallas_kernels.blocks import Choice, read
from pallas_kernels.dispatch import Target
from pallas_kernels.selective_scan import tpu_blocks

SHAPE = {"num_queries": 2048, "num_keys": 2048, "group": 1}
SHAPE |= {"head_dim": 64, "itemsize": 2, "window": None}
RULE = {"queries": 512, "keys": 512}


@pytest.fixture
def choice(tmp_path) -> Choice:
    folder = tmp_path / "attention"
    folder.mkdir()
    table = dataclasses.replace(TABLE, path=folder / "blocks.json")
    return Choice(table, "chip", SHAPE, RULE)


def bowl(name, queries, keys, trace=None):
    """A cost with its least at these sizes."""

    def cost(sizes):
        x = sizes[name]
        if trace is not None:
            trace.append(tuple(x.values()))
        return 1 + abs(math.log2(x["queries"] / queries)) + abs(math.log2(x["keys"] / keys))

    return cost


@pytest.mark.parametrize("least", [(512, 512), (128, 2048), (2048, 256), (256, 512)])
def test_the_search_finds_the_least_cost_with_few_programs(choice, least):
    tried = []
    found = search({"a": choice}, bowl("a", *least, tried))
    assert tuple(found.sizes["a"].values()) == least
    assert found.cost == 1
    assert len(set(tried)) <= 12, "of 25 that the table allows"


def test_the_search_keeps_the_rule_where_nothing_gains_more_than_a_percent(choice):
    def cost(sizes):
        return 1000 - 9 * (sizes["a"]["keys"] == 256)

    assert search({"a": choice}, cost).sizes == {"a": RULE}


def test_the_search_passes_by_what_cannot_be(choice):
    def cost(sizes):
        keys = sizes["a"]["keys"]
        return math.inf if keys > 512 else 1 / keys

    assert search({"a": choice}, cost).sizes == {"a": RULE}
    two = {"a": choice, "b": choice._replace(shape=SHAPE | {"group": 2})}
    found = search(two, lambda sizes: bowl("a", 512, 512)(sizes) + bowl("b", 128, 256)(sizes))
    assert found.sizes == {"a": RULE, "b": {"queries": 128, "keys": 256}}


def test_a_log_keeps_costs_from_run_to_run(tmp_path, rng):
    path, cost = tmp_path / "folder" / "log.jsonl", rng.random()
    log = tune.Log(path)
    assert log["program"] is None
    log["program"], log["that does not fit"] = cost, math.inf
    again = tune.Log(path)
    assert again["program"] == cost and again["that does not fit"] == math.inf


def result(choice, sizes) -> tune.Tuned:
    (case,) = CASES["attention"](True)
    device = Device("v0", Target("tpu", "chip"), "cycles", None, None, lambda *_: 100.0)
    return tune.Tuned(device, case, {"a": choice}, {"a": sizes}, {FORWARD: 300}, {FORWARD: 200})


def test_a_table_has_what_is_better_than_the_rule_and_only_that(choice):
    other = choice._replace(device_kind="another chip")
    wide, narrow = {"queries": 512, "keys": 1024}, {"queries": 128, "keys": 512}
    tune.save(result(choice, wide))
    tune.save(result(other, wide))
    tune.save(result(choice, narrow))
    assert read(choice.table) == {
        (kind, frozenset(SHAPE.items())): sizes
        for kind, sizes in (("chip", narrow), ("another chip", wide))
    }
    assert len(choice.table.path.read_text().splitlines()) == 8, "an entry a line"
    tune.save(result(choice, RULE))
    assert {kind for kind, _ in read(choice.table)} == {"another chip"}
    tune.save(result(other, RULE))
    assert not choice.table.path.exists()


def test_the_report_has_costs_before_and_after(choice):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tune.report([result(choice, {"queries": 512, "keys": 1024})]))
    text = console.export_text()
    assert "queries 512, keys 512 -> queries 512, keys 1024" in text
    for number in ("300", "200", "0.667", "3.00", "2.00"):
        assert number in text


def tune_selective_scan(device, contender, tmp_path) -> tuple[tune.Tuned, str]:
    (case,) = CASES["selective_scan"](True)
    console = Console(width=200, record=True, file=io.StringIO())
    log = tune.Log(tmp_path / "log.jsonl")
    return tune.tune(device, case, contender, log, console), console.export_text()


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    """On a device whose costs are made up: wide blocks are dear."""
    asked = []
    function = functools.partial(selective_scan, implementation="tpu_interpret")
    contender = Contender("tpu", function, is_peer=False)

    def cost(case, contender, measured, sizes):
        (sizes,) = sizes.values()
        asked.append((measured, sizes["channels"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return float(sizes["channels"])

    device = dataclasses.replace(present(), name="v0", cost=cost)
    with pytest.raises(KeyboardInterrupt):
        tune_selective_scan(device, contender, tmp_path)
    tuned, text = tune_selective_scan(device, contender, tmp_path)
    passes = (FORWARD, BOTH)
    assert asked[:2] == [(measured, 256) for measured in passes]
    assert asked[3:] == [(measured, 128) for measured in passes], "and none of those before"
    assert [x["channels"] for x in tuned.sizes.values()] == [128]
    assert set(tuned.before.values()) == {256.0} and set(tuned.after.values()) == {128.0}
    assert "v0 selective_scan [1, 512, 256], state 16 tpu: channels 128: 256 s" in text


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_available(), reason="NOT PROVEN FOR TPU: no libtpu")
def test_a_run_with_the_compiler(tmp_path, monkeypatch):
    folder = tmp_path / "selective_scan"
    folder.mkdir()
    table = dataclasses.replace(tpu_blocks.TABLE, path=folder / "blocks.json")
    monkeypatch.setattr(tpu_blocks, "TABLE", table)
    # As if the rule had narrow blocks.
    monkeypatch.setattr(tpu_blocks, "MOST_CHANNELS", 128)
    with Compiler() as compiler:
        device = absent("v5e", compiler)
        (contender,) = device.kernels(CASES["selective_scan"](True)[0])
        tuned, text = tune_selective_scan(device, contender, tmp_path)
    assert "channels 256" in text and "cannot" not in text
    for measured, before in tuned.before.items():
        assert tuned.device.least(tuned.case, measured) < tuned.after[measured] < before
    tune.save(tuned)
    ((kind, _), sizes), *rest = read(table).items()
    assert (kind, sizes, rest) == ("TPU v5 lite", {"channels": 256}, [])
    entries = json.loads(table.path.read_text())
    assert entries["TPU v5 lite"][0]["shape"]["time"] == 512
