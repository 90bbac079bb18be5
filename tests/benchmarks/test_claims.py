"""The harness of the claims: verdicts both ways, runs that are not done twice, the page, and the count of copies.

That the claims hold is no test's business: they are measured, and the page says what came of them.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.claims import copies
from benchmarks.claims.__main__ import read
from benchmarks.claims.bench import Bench
from benchmarks.claims.catalogue import CLAIMS
from benchmarks.claims.page import document
from benchmarks.claims.spread import cell, is_level, is_lower, is_no_higher
from configs import transformer
from effjax import run_config
from effjax.checkpoint import CheckpointError
from effjax.training import config as configs
from pallas_kernels import attention
from pallas_kernels.blocks import decided_by

REPOSITORY = Path(__file__).parents[2]
SEEDS = range(3)
# What every run of a language model reports beside its loss.
COMMON = {"steps": 10, "params": 1000, "flops_per_token": 5.0, "training_flops": 1e9}


def runs_of(losses, **measures):
    """Three runs of each model, around its loss; `measures`: of all models, or by model."""
    return [
        {"model": model, "seed": seed, "heldout_bits_per_byte": loss + 0.01 * seed, **COMMON}
        | {k: v[model] if isinstance(v, dict) else v for k, v in measures.items()}
        for model, loss in losses.items()
        for seed in SEEDS
    ]


def mor(good):
    losses = {"transformer": 2.0, "recursive": 2.1, "mor": 1.9 if good else 2.2}
    params = {"transformer": 900, "recursive": 500, "mor": 500 if good else 1000}
    mine = 20.0 if good else 5.0
    speed = {"transformer": [10.0, 11.0], "recursive": [10.0, 11.0], "mor": [mine, mine]}
    return {"runs": runs_of(losses, params=params), "tokens_per_second": speed}


def switch(good):
    losses = {"dense": 2.0, "switch, 8 experts": 1.9 if good else 2.0}
    return {"runs": runs_of(losses, fraction_dropped=0.1)}


def adamoe(good):
    name = "adamoe, 2 of 8 + 2 null"
    losses = {"top-2": 2.0, "top-1": 2.1, name: 2.0 if good else 2.2}
    flops = {"top-2": 2.0, "top-1": 1.0, name: 1.5}
    measures = {"expert_flops_per_token": flops, "experts_per_token": flops}
    return {"runs": runs_of(losses, **measures, fraction_dropped=0.0)}


def based(good):
    linear = (0.5, 0.8, 0.995) if good else (0.5, 0.3, 0.2)
    accuracies = {"attention": 1.0, "window 8": 0.4, "window 16": 0.6}
    accuracies |= {f"linear, feature_dim {d}": x for d, x in zip((2, 4, 8), linear, strict=True)}
    states = dict(zip(accuracies, (9, 5, 7, 4, 5 if good else 8, 6), strict=True))
    recall = [
        {"model": m, "seed": s, "accuracy": a - 0.001 * s, "state": states[m], "params": 10}
        for m, a in accuracies.items()
        for s in SEEDS
    ]
    text = runs_of({"transformer": 2.0, "based": 2.005 if good else 2.05})
    return {"recall": recall, "text": text}


def matryoshka(good):
    def point(method, dims, sizes, cost, recall):
        return {"method": method, "dims": dims, "sizes": sizes, "multiply_adds": cost, "k": 10}

    runs = []
    for seed in SEEDS:
        nested = {8: 0.5, 16: 0.6, 64: 0.7} if good else {8: 0.3, 16: 0.4, 64: 0.7}
        curve = [
            point("full", [m], [10], 100 * m, x) | {"recall": x + 0.01 * seed}
            for m, x in nested.items()
        ]
        short = point("adaptive", [8, 64], [64, 10], 900, 0) | {"recall": 0.72 if good else 0.4}
        runs.append({"model": "nested", "seed": seed, "documents": 100, "curve": [*curve, short]})
        for m, x in {8: 0.5, 16: 0.6, 64: 0.7}.items():
            own = point("full", [m], [10], 100 * m, x) | {"recall": x + 0.01 * seed}
            runs.append({"model": f"only {m}", "seed": seed, "documents": 100, "curve": [own]})
    return {"runs": runs}


def attention_io(good):
    points = []
    for length in (4096, 8192, 16384):
        for dim in (128, 256):
            for queries in (128, 512):
                vmem = queries * dim * 8
                moved = length**2 * dim**2 * 4 // vmem if good else length * dim * 8
                size = {"length": length, "dim": dim, "queries": queries, "vmem_bytes": vmem}
                law = moved * vmem / (length * dim) ** 2
                points.append(size | {"hbm_bytes": moved + 10, "compulsory_bytes": 10, "law": law})
    unfused = [{"length": n, "hbm_bytes": n**3 if good else 1} for n in (4096, 8192, 16384)]
    return {"points": points, "refused": [], "unfused": unfused}


def flash_attention(good):
    memory = [{"length": n, "flash": n if good else n * n, "written_out": n * n} for n in (1, 2, 4)]
    cycles = [{"shape": "x", "pass": "y", "tpu": 10, "jax flash": 20 if good else 5}]
    return {"memory": memory, "cycles": cycles}


def two_pass_softmax(good):
    row = {"shape": [2, 100], "two_pass": 2400 if good else 3200, "xla": 3200}
    return {
        "bytes": [row],
        "seconds": {"two_pass": [1.0, 2.0], "xla": [2.0, 4.0] if good else [0.5, 1.0]},
    }


MADE_UP = {
    "mor": mor,
    "switch": switch,
    "adamoe": adamoe,
    "based": based,
    "matryoshka": matryoshka,
    "attention-io-complexity": attention_io,
    "flash-attention-2": flash_attention,
    "two-pass-softmax": two_pass_softmax,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_verdicts_go_both_ways(name):
    report = {good: {"setting": "x"} | MADE_UP[name](good) for good in (True, False)}
    assert all(verdict.reproduced for verdict in CLAIMS[name].verdicts(report[True]))
    assert not any(verdict.reproduced for verdict in CLAIMS[name].verdicts(report[False]))
    for table in CLAIMS[name].tables(report[True]):
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_means_spreads_and_differences_from_seed_to_seed():
    runs = runs_of({"a": 1.0, "b": 1.005, "c": 2.0})
    assert cell([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert cell([7, 7], ",.0f") == "7"
    key = "heldout_bits_per_byte"
    assert is_lower(runs, "a", "b", key)  # with every seed, although the seeds overlap
    assert not is_lower(runs, "b", "a", key)
    assert is_no_higher(runs, "b", "a", key)  # within 0.01
    assert not is_no_higher(runs, "c", "a", key)
    assert is_level(runs, "b", "a", key)  # within 1 %
    assert not is_level(runs_of({"a": 1.0, "b": 1.03}), "b", "a", key)
    with pytest.raises(ValueError, match="no seed in common"):
        is_lower([*runs, {"model": "d", "seed": 9, key: 0.0}], "d", "a", key)


def test_the_page_is_what_the_stored_results_say():
    stored = read(REPOSITORY / "benchmarks/results/claims")
    page = REPOSITORY / "docs/RESULTS.md"
    assert page.read_text() == document(CLAIMS, stored), "run python -m benchmarks.claims --only="
    assert all((page.parent / f"results/{name}.png").is_file() for name in stored)


def test_a_finished_run_is_not_done_again_and_another_config_is_refused(tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("word " * 1000)
    bench = Bench(tmp_path, [str(text)], SEEDS)
    config = bench.on_text(transformer.get_config(), seq_len=16, batch_size=8)
    assert (tmp_path / "text/heldout/some.txt").stat().st_size == 500
    workdir = tmp_path / "claim/a-model-seed2"
    workdir.mkdir(parents=True)
    resolved = configs.resolve(config) | {"seed": 2}
    resolved["data"]["seed"] = 2
    del resolved["training"]["nonfinite"]  # a field that came after the run
    run_config.save(workdir, resolved)
    summary = {"steps": config.training.num_steps, "heldout_bits_per_byte": 1.5}
    (workdir / "summary.json").write_text(json.dumps(summary))
    (workdir / "report.json").write_text(json.dumps({"model": "x"}))
    line = {"step": summary["steps"], "flops/spent": 7.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = bench.train("claim", "A model", config, 2)
    assert found.summary == summary
    assert found.training_flops == 3 * 7.0 * summary["steps"] * 16 * 8
    config.model.d_model = 64
    with pytest.raises(CheckpointError, match="d_model"):
        bench.train("claim", "A model", config, 2)


@pytest.mark.parametrize("queries", [128, 256])
def test_copies_of_attention_are_its_tiles(queries):
    length, dim = 256, 128
    x = jax.ShapeDtypeStruct((1, length, 1, dim), jnp.bfloat16)
    attend = functools.partial(attention, causal=False, implementation="tpu_interpret")
    with decided_by(lambda choice: {"queries": queries, "keys": 128}):
        copied, compulsory = copies.traffic(jax.make_jaxpr(attend)(x, x, x))
    # Queries, results and log-sum-exps once, keys and values once for each tile of queries.
    array, statistic = length * dim * 2, length * 4
    assert compulsory == 4 * array + statistic
    assert copied == 2 * array + statistic + 2 * array * (length // queries)
