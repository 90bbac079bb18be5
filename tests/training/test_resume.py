"""However a run ends, it goes on as if it had not: same batches, same numbers, bit for bit."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import Crash, CrashingScreen, SignallingScreen, bits, curve, make_config, quiet, train

from effjax import data
from effjax.training.loop import Run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    seed = np.random.SeedSequence().entropy
    print(f"text seed: {seed}")
    return tiny_run.write_text(tmp_path_factory.mktemp("text"), np.random.default_rng(seed))


@pytest.fixture(scope="module")
def config(text):
    return make_config(text, ema_decay=0.9)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nothing interrupts."""
    return train(config, tmp_path_factory.mktemp("whole"))


def assert_same_end(run, whole):
    assert curve(run.workdir) == curve(whole.workdir)
    assert [line["step"] for line in curve(run.workdir)] == [3, 6, 9, 12]
    assert bits(run.state) == bits(whole.state)
    assert run.progress.tokens == whole.progress.tokens


# Checkpoints are at 4 and 8: nothing is saved yet, one is, and two are; log lines are at 3, 6 and 9.
@pytest.mark.parametrize("crash_at", [2, pytest.param(6, marks=pytest.mark.slow), 11])
def test_a_crashed_run_ends_as_if_nothing_had_been(tmp_path, config, whole, crash_at):
    with pytest.raises(Crash):
        train(config, tmp_path, quiet(CrashingScreen, config, crash_at))
    assert_same_end(train(config, tmp_path), whole)


def test_the_optimizer_may_live_in_the_memory_of_the_host(tmp_path, text, whole):
    config = make_config(text, ema_decay=0.9, offload_optimizer=True)
    with pytest.raises(Crash):
        train(config, tmp_path, quiet(CrashingScreen, config, 6))
    run = train(config, tmp_path)
    assert_same_end(run, whole)
    assert kinds(run.state.opt_state) == {"pinned_host"}
    assert kinds(run.state.params) == kinds(run.state.ema) == {"device"}


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def test_a_crashed_run_goes_on_with_the_very_next_batch(tmp_path, config, monkeypatch):
    seen = []
    next_batch = Run._next_batch

    def recording(run):
        batch, counts = next_batch(run)
        seen.append(np.asarray(batch["tokens"]).tolist())
        return batch, counts

    monkeypatch.setattr(Run, "_next_batch", recording)
    with pytest.raises(Crash):
        train(config, tmp_path, quiet(CrashingScreen, config, 6))
    before, seen[:] = list(seen), []
    train(config, tmp_path)
    stream = data.build(config.data, split="train")
    expected = [batch["tokens"].tolist() for batch in itertools.islice(stream, 12)]
    assert before == expected[: len(before)]
    # How far the loop was when the metrics of step 6 came decides which checkpoint is the last.
    assert seen in (expected[4:], expected[8:])
    assert expected[4:8] != expected[8:12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, config, whole, number):
    before = signal.getsignal(number)
    stopped = train(config, tmp_path, quiet(SignallingScreen, config, 5, number))
    assert stopped.received == number
    assert 5 <= stopped.step <= 7
    assert signal.getsignal(number) == before
    assert (tmp_path / "checkpoints" / str(stopped.step)).is_dir()
    assert_same_end(train(config, tmp_path), whole)


@pytest.mark.slow
def test_accumulated_gradients_resume_too(tmp_path, text):
    config = make_config(text, accumulation_steps=2)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Crash):
        train(config, tmp_path / "parts", quiet(CrashingScreen, config, 8))
    assert_same_end(train(config, tmp_path / "parts"), whole)


@pytest.mark.slow  # and in benchmarks.faults, again and again
def test_sigkill_in_mid_save(tmp_path, text, config, whole):
    """Kills a process as soon as the folder of its second checkpoint appears under its unfinished name."""
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import tiny_run\n"
        "tiny_run.train(tiny_run.make_config(sys.argv[2], ema_decay=0.9), Path(sys.argv[3]))\n"
    )
    here = Path(tiny_run.__file__).parent
    process = subprocess.Popen([sys.executable, "-c", script, here, text, tmp_path])
    folder = tmp_path / "checkpoints"
    while process.poll() is None:
        if (folder / "4").exists() and any(folder.glob("8*")):
            process.kill()
            break
        time.sleep(0.0005)
    assert process.wait() == -signal.SIGKILL
    assert_same_end(train(config, tmp_path), whole)


def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path, config, whole, caplog):
    train(config, tmp_path, quiet(SignallingScreen, config, 9, signal.SIGTERM))
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    resumed = train(config, tmp_path)
    assert f"checkpoint {newest} cannot be read" in caplog.text
    assert_same_end(resumed, whole)


def test_a_half_written_log_line_is_dropped(tmp_path, config, whole):
    with pytest.raises(Crash):
        train(config, tmp_path, quiet(CrashingScreen, config, 11))
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 12, "loss": 1.0})[:12])
    assert_same_end(train(config, tmp_path), whole)
