"""Evaluation of whole runs, with real data, models and checkpoints; only the training is left out."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from matplotlib.image import imread

from effjax import data, evaluation, models, run_config
from effjax.checkpoint import CheckpointError, Checkpoints
from effjax.evaluation.heldout import evaluate_language_model
from effjax.training.sharding import make_mesh
from effjax.training.state import init_state

SMALL = {"d_model": 16, "ffn": {"hidden_dim": 16}, "max_seq_len": 64}
EVALUATION = {"num_batches": 2, "latency_runs": 2}


def config_of(model, source, **overrides):
    return {
        "seed": 0,
        "model": models.spec(model, **SMALL | overrides),
        "data": {"source": source, "seq_len": 64, "batch_size": 4, "shuffle_window": 8},
        "objective": {"name": "next_token"},
        "evaluation": EVALUATION,
    }


def save_run(config, workdir, steps=(3,)):
    """A workdir as training leaves it, the parameters of each step drawn from that seed."""
    workdir.mkdir(exist_ok=True)
    run_config.save(workdir, config)
    model = models.create(**config["model"])
    iterator = data.build(config["data"], split="train")
    with Checkpoints(workdir) as checkpoints:
        for step in steps:
            state = state_of(model, step)
            checkpoints.save(state.replace(step=np.int32(step)), iterator, {})
    iterator.close()


def state_of(model, seed):
    init = functools.partial(init_state, model, optax.sgd(0.1), seq_len=64, seed=seed, ema=False)
    return jax.jit(init)()


@pytest.fixture(scope="module")
def text_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 4).tolist()) for _ in range(20)]
    for i in range(30):
        (folder / f"{i}.txt").write_bytes(b" ".join(rng.choice(words, 60)))
    return {"name": "text", "paths": [str(folder / "*.txt")], "heldout_fraction": 0.4}


@pytest.fixture(scope="module")
def run(text_source, tmp_path_factory):
    """(config, workdir, report) of a Mixture-of-Recursions with two checkpoints, evaluated once on a mesh."""
    config = config_of("mor", text_source, num_layers=5) | {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2}
    }
    workdir = tmp_path_factory.mktemp("runs") / "mor"
    save_run(config, workdir, steps=(3, 7))
    return config, workdir, evaluation.evaluate(None, workdir)


def test_report_is_on_disk_with_what_suits_the_model(run):
    _, workdir, report = run
    assert json.loads((workdir / "report.json").read_text()) == report
    assert report["model"] == "mor"
    assert report["step"] == 7
    assert report["parameters"]["active"] == report["parameters"]["total"]
    cost = report["cost"]
    assert cost["flops_per_token"] > 0
    assert cost["flops_per_token"] <= cost["flops_per_token_if_nothing_is_skipped"]
    assert 1 <= report["token_depth"]["mean"] <= 3
    depths = {row["value"]: row["tokens"] for row in report["token_depth"]["counts"]}
    assert sum(depths.values()) == report["heldout"]["tokens"]
    assert set(depths) <= {1.0, 2.0, 3.0}
    assert f"{report['heldout']['bits_per_byte']:.4g}" in (workdir / "report.txt").read_text()


def test_numbers_are_those_of_the_checkpoint_on_the_first_heldout_batches(run):
    config, _, report = run
    model = models.create(**config["model"])
    tokenizer = data.tokenizer(config["data"])
    batches = itertools.islice(data.build(config["data"], split="heldout"), 2)
    found = evaluate_language_model(
        model, state_of(model, 7).variables(), batches, tokenizer.token_num_bytes
    )
    assert report["heldout"]["loss"] == pytest.approx(found.loss, rel=1e-5)
    assert report["heldout"]["tokens"] == found.token_counts.sum()
    # About what random parameters give: a byte costs a byte, and n-grams of 20 words less.
    assert 6 < report["heldout"]["bits_per_byte"] < 12
    assert report["heldout"]["baselines"]["bigram_bits_per_byte"] < 4
    assert report["heldout"]["baselines"]["unigram_bits_per_byte"] < 5
    by_position = report["heldout"]["by_position"]
    assert sum(row["tokens"] for row in by_position) == report["heldout"]["tokens"]


def test_plots_are_where_the_report_says(run):
    _, workdir, report = run
    assert set(report["plots"]) == {
        "plots/loss_by_position.png",
        "plots/histogram_depth.png",
        "plots/text_depth.png",
        "plots/text_depth.html",
    }
    for name in report["plots"]:
        assert (workdir / name).stat().st_size > 1000
        if name.endswith(".png"):
            assert imread(workdir / name).std() > 0.01


def test_an_earlier_checkpoint_can_be_chosen(run):
    config, workdir, report = run
    chosen = config | {"evaluation": EVALUATION | {"step": 3}}
    earlier = evaluation.evaluate(chosen, workdir)
    assert earlier["step"] == 3
    assert earlier["heldout"]["loss"] != report["heldout"]["loss"]
    with pytest.raises(CheckpointError, match=r"step 5 .* 3, 7"):
        evaluation.evaluate(config | {"evaluation": EVALUATION | {"step": 5}}, workdir)


def test_parameters_are_split_over_the_mesh(run):
    _, workdir, _ = run
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    split = evaluation.restore(None, workdir, mesh).variables
    whole = evaluation.restore(None, workdir).variables
    for x, want in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        assert x.sharding.mesh == mesh
        np.testing.assert_array_equal(x, want)
    kernel = split["params"]["depth"]["first"]["blocks_0"]["mixer"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4


def test_a_mesh_that_does_not_fit_is_an_error_if_it_was_asked_for(run, caplog):
    config, workdir, report = run
    wrong = config | {"mesh": {"data": 3}}
    with pytest.raises(ValueError, match=r"data\.batch_size=4; valid: a multiple of 3"):
        evaluation.evaluate(wrong, workdir)
    run_config.save(workdir, wrong)  # as if it had been trained on another machine
    found = evaluation.evaluate(None, workdir)
    run_config.save(workdir, config)
    assert "evaluating on 4 of the devices here, mesh.fsdp=4" in caplog.text
    assert found["heldout"]["loss"] == pytest.approx(report["heldout"]["loss"], rel=1e-5)


def test_another_model_than_the_trained_one_is_an_error(run):
    config, workdir, _ = run
    before = (workdir / "report.json").read_text()
    other = config | {"model": config["model"] | {"d_model": 32, "dtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"model\.d_model \(there: 16, given: 32\)") as error:
        evaluation.evaluate(other, workdir)
    assert "model.dtype" in str(error.value)
    assert "model.num_layers" not in str(error.value)
    assert (workdir / "report.json").read_text() == before


def test_embedder_is_evaluated_by_retrieval(tmp_path):
    source = {"name": "stdlib_pairs"}
    config = config_of("matryoshka", source, num_layers=1)
    config["objective"] = {"name": "contrastive", "matryoshka_dims": [4, 16]}
    model = models.create(**config["model"])
    variables = state_of(model, 0).variables()
    report = evaluation.evaluate_variables(config, model, variables, tmp_path)
    assert report["step"] is None
    assert "heldout" not in report
    found = report["retrieval"]
    assert found["queries"] <= 8
    assert {row["dims"][-1] for row in found["curve"]} == {4, 16}
    assert found["recall@1 with 4"] <= found["recall@5 with 4"] <= 1
    assert set(report["plots"]) == {
        "plots/recall_by_dimension.png",
        "plots/adaptive_retrieval.png",
    }
    assert report["cost"]["flops_per_token"] > 0
    assert report["cost"]["decode_state_bytes_per_sequence"] is None


def test_generated_recall_is_measured_by_its_answers(tmp_path):
    source = {"name": "associative_recall", "num_pairs": 4, "vocab_size": 64}
    config = config_of("transformer", source, num_layers=1)
    model = models.create(**config["model"])
    report = evaluation.evaluate_variables(config, model, state_of(model, 0).variables(), tmp_path)
    found = report["associative_recall"]
    assert found["answers"] == 2 * 4 * 4
    assert 0 <= found["accuracy"] <= 1
    assert sum(row["answers"] for row in found["by_distance"]) == found["answers"]
    assert report["heldout"]["bits_per_byte"] is None
    assert "baselines" not in report["heldout"]
    assert "plots/associative_recall.png" in report["plots"]


def test_a_workdir_without_a_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        evaluation.evaluate(None, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_a_checkpoint_is_an_error(text_source, tmp_path):
    run_config.save(tmp_path, config_of("transformer", text_source))
    with pytest.raises(CheckpointError, match="checkpoint"):
        evaluation.evaluate(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_variables_may_live_on_a_mesh(text_source, tmp_path):
    config = config_of("transformer", text_source, num_layers=1)
    model = models.create(**config["model"])
    variables = state_of(model, 0).variables()
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    report = evaluation.evaluate_variables(
        config,
        model,
        jax.device_put(variables, sharding),
        tmp_path,
        on_devices=lambda batch: jax.device_put(dict(batch), sharding),
    )
    assert np.isfinite(report["heldout"]["loss"])


@pytest.mark.slow  # by default the command is run with a prompt, in test_prompt
def test_the_command_prints_the_table_and_says_what_it_wrote(text_source, tmp_path):
    config = config_of("transformer", text_source, num_layers=1)
    save_run(config, tmp_path / "run")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "eval.py", f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.txt").read_text() in done.stdout
    assert "report.json and plots/loss_by_position.png" in done.stdout
    assert "orbax" not in done.stderr
