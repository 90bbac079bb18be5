"""`fit` from a config to its summary, and what stops it."""

import dataclasses
import hashlib
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jax.experimental.compilation_cache import compilation_cache
from tiny_run import bits, curve, make_config, train

from effjax import checkpoint, compilation, data, registry, training
from effjax.checkpoint import CheckpointError
from effjax.data.sources import Pair
from effjax.ffn import Gated
from effjax.training import NonFiniteLossError
from effjax.training import config as configs
from effjax.training.progress import Screen


@registry.register("schedule", "broken_from")
def broken_from(num_steps: int, *, step: int = 0):
    """A learning rate that is no number from one step on, as after a division by zero."""
    return optax.join_schedules(
        [optax.constant_schedule(1e-3), optax.constant_schedule(float("nan"))], [step]
    )


@pytest.fixture
def text(tmp_path, rng):
    return tiny_run.write_text(tmp_path / "text", rng)


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_fit_leaves_a_summary_and_everything_to_look_at(tmp_path, text, capsys):
    config = make_config(text)
    workdir = tmp_path / "run"
    summary = training.fit(config, workdir)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["steps"] == 12
    variables, step = checkpoint.restore_variables(workdir)
    assert step == 12
    assert summary["params"] == sum(x.size for x in jax.tree.leaves(variables))
    stream = data.build(config.data, split="train")
    tokens = sum(int((next(stream)["segment_ids"] > 0).sum()) for _ in range(12))
    assert summary["tokens"] == tokens
    for field in ("heldout_bits_per_byte", "unigram_bits_per_byte", "bigram_bits_per_byte"):
        assert 0 < summary[field] < 10
    for field in ("tokens_per_second", "flops_per_token", "wall_seconds", "compile_seconds"):
        assert summary[field] > 0
    left = {path.name for path in workdir.iterdir()}
    assert left >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "loss.png",
        "report.json",
        "checkpoints",
    }
    assert [line["step"] for line in curve(workdir)] == [3, 6, 9, 12]
    assert [line["step"] for line in curve(workdir) if "heldout/bits_per_byte" in line] == [6, 12]
    printed = capsys.readouterr().out
    assert "step 12/12" in printed
    assert "heldout_bits_per_byte" in printed

    before = content(workdir)
    assert training.fit(config, workdir) == summary  # nothing to do
    assert "has done its 12 steps already" in capsys.readouterr().out
    assert content(workdir) == before

    config.model.d_model = 32
    config.optimizer.b1 = 0.5
    with pytest.raises(
        CheckpointError, match=r"model.d_model \(there: 16, now: 32\).*optimizer.b1"
    ):
        training.fit(config, workdir)
    assert content(workdir) == before


@registry.register("source", "test_numbers")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """A number in decimal, to be matched with itself in hexadecimal."""

    def pairs(self, split):
        start = {"train": 1000, "heldout": 2000}[split]
        return [Pair(str(i), str(i), str(i), hex(i)) for i in range(start, start + 40)]


@pytest.mark.slow
def test_an_embedder_is_summarised_by_its_recall(tmp_path):
    config = configs.default("matryoshka", d_model=16, num_layers=1)
    config.data.source = configs.part_config("source", "test_numbers")
    config.data.update(seq_len=16, batch_size=8)
    config.objective = configs.part_config("objective", "contrastive", matryoshka_dims=(4, 16))
    config.mesh.data = 1
    config.training.update(
        num_steps=3, log_every=1, eval_every=2, eval_batches=2, checkpoint_every=9
    )
    config.evaluation.update(num_batches=4, latency_runs=1)
    summary = training.fit(config, tmp_path)
    assert 0 < summary["retrieval_recall@10 with 16"] <= 1
    assert "heldout_bits_per_byte" not in summary
    assert [line["step"] for line in curve(tmp_path) if "heldout/accuracy/16" in line] == [2, 3]


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path, text):
    train(make_config(text, num_steps=4), tmp_path)
    run = train(make_config(text, num_steps=7), tmp_path)
    assert run.step == 7
    assert [line["step"] for line in curve(tmp_path)] == [3, 4, 6, 7]


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path, text):
    config = make_config(
        text, num_steps=10, eval_every=3, checkpoint_every=1, keep=1, keep_best=True
    )
    config.optimizer.schedule.peak = 0.3  # so high that the loss does not fall all the time
    train(config, tmp_path)
    heldout = {s["step"]: s["heldout/loss"] for s in curve(tmp_path) if "heldout/loss" in s}
    assert sorted(heldout) == [3, 6, 9, 10]
    best = min(heldout, key=heldout.get)
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 10}


def test_the_average_is_kept_and_preferred(tmp_path, text):
    run = train(make_config(text, ema_decay=0.5), tmp_path)
    variables, _ = checkpoint.restore_variables(tmp_path)
    assert bits(variables["params"]) == bits(run.state.ema)
    assert bits(run.state.ema) != bits(run.state.params)


@pytest.mark.slow  # the step itself: test_step
def test_accumulation_reaches_the_step(tmp_path, text):
    """Two half batches give the update of the whole one."""
    curves = [
        curve(train(make_config(text, accumulation_steps=n), tmp_path / str(n)).workdir)
        for n in (1, 2)
    ]
    losses = [[line["loss"] for line in lines] for lines in curves]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0] != losses[1]  # they are added up in another order


class RecordingScreen(Screen):
    def say(self, message):
        self.said = [*getattr(self, "said", []), message]


@registry.register("ffn", "test_halves")
class Halves(Gated):
    """A feed-forward that gives only half of its output until step 2."""

    gain: float = 1.0

    def at_step(self, step):
        return self.clone(gain=0.5 if step < 2 else 1.0)

    def __call__(self, x, *, mask=None, train=False):
        y, aux = super().__call__(x, mask=mask, train=train)
        return self.gain * y, aux | {"test/gain": jnp.float32(self.gain)}


def test_a_model_that_changes_along_the_run_is_compiled_anew(tmp_path, text):
    config = make_config(text, num_steps=4, log_every=1)
    config.model.ffn = configs.part_config("ffn", "test_halves")
    screen = tiny_run.quiet(RecordingScreen, config)
    run = train(config, tmp_path, screen)
    compilations = [message for message in screen.said if "compiled" in message]
    assert [message.split(":")[0] for message in compilations] == ["step 0", "step 2"]
    assert [line["test/gain"] for line in curve(tmp_path)] == [0.5, 0.5, 1.0, 1.0]
    assert run.current_model.ffn.gain == 1.0


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_and_poisons_nothing(tmp_path, text, checkpoint_every):
    config = make_config(text, checkpoint_every=checkpoint_every, eval_every=100, keep=9)
    config.optimizer.schedule = configs.part_config("schedule", "broken_from", step=6)
    with pytest.raises(NonFiniteLossError) as raised:
        train(config, tmp_path)
    message = str(raised.value)
    last_good = {1: 6, 4: 4}[checkpoint_every]
    # Update 7 poisons the parameters: a save sees that at once, else the loss of the next step shows it.
    assert ("after step 7" if checkpoint_every == 1 else "step 8: ") in message
    assert ("'kernel'" if checkpoint_every == 1 else "loss=nan") in message
    assert str(tmp_path / "checkpoints" / str(last_good)) in message
    variables, step = checkpoint.restore_variables(tmp_path)
    assert step == last_good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_steps_that_are_not_finite_are_skipped_up_to_a_bound(tmp_path, text):
    config = make_config(text, checkpoint_every=1, eval_every=100, log_every=1, keep=9)
    config.training.update(nonfinite="skip", max_skipped=3)
    config.optimizer.schedule = configs.part_config("schedule", "broken_from", step=6)
    with pytest.raises(NonFiniteLossError) as raised:
        train(config, tmp_path)
    message = str(raised.value)
    assert message.startswith("step 10: the update is not finite; the last good checkpoint is")
    assert "3 steps before it were skipped (training.max_skipped)" in message
    skipped = {line["step"]: line["skipped"] for line in curve(tmp_path)}
    assert skipped == {step: int(step > 6) for step in range(1, 10)}
    before, after = (checkpoint.restore_variables(tmp_path, step)[0] for step in (6, 9))
    assert bits(before) == bits(after)


def test_a_workdir_that_is_a_file(tmp_path, text):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file"):
        training.fit(make_config(text), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_config_that_cannot_work_leaves_no_workdir(tmp_path, text):
    with pytest.raises(ValueError, match=r"training.log_every=0"):
        training.fit(make_config(text, log_every=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_signals_are_left_alone_outside_the_main_thread(tmp_path, text):
    runs = []
    config = make_config(text, num_steps=2)
    thread = threading.Thread(target=lambda: runs.append(train(config, tmp_path)))
    thread.start()
    thread.join()
    assert runs[0].step == 2


@pytest.fixture
def no_cache_chosen():
    settings = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 1.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def test_compilation_cache_lies_in_the_users_cache(tmp_path, monkeypatch, no_cache_chosen):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.jit(lambda x: x + 1)(0)  # a notebook has compiled something before it trains
    folder = compilation.enable_cache()
    assert folder == tmp_path / "effjax" / "xla"
    jax.jit(lambda x: x * x - 3)(jnp.arange(5))
    assert any(folder.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    assert compilation.enable_cache() == folder  # chosen by now


def test_no_cache_where_none_can_be_written(tmp_path, monkeypatch, caplog, no_cache_chosen):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level("INFO"):
        assert compilation.enable_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert "compiling without a cache" in caplog.text
