"""Several processes train as one, each on its share of the data, and end together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import watched_recipe
from tiny_run import curve, leaves

from effjax import checkpoint, training
from effjax.training import distributed
from effjax.training.batches import Share
from effjax.training.sharding import make_mesh

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@contextlib.contextmanager
def processes(workdir, folders, *flags, stop_at="", program="train.py"):
    """The program in one process of one device for each of `folders`, all of them together."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    started = []
    try:
        for i, argument in enumerate(folders):
            command = [
                *(sys.executable, ROOT / program, "--distributed"),
                f"--config={HERE / 'watched_recipe.py'}:{argument}",
                f"--workdir={workdir}",
                f"--distributed.coordinator_address={address}",
                f"--distributed.num_processes={len(folders)}",
                f"--distributed.process_id={i}",
                *flags,
            ]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment(stop_at), **pipes))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def environment(stop_at=""):
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        watched_recipe.STOP_AT: stop_at,
    }


def train_to_step_8(config, workdir):
    """In this process, and a few steps further."""
    stops = tiny_run.quiet(tiny_run.SignallingScreen, config, 8, signal.SIGTERM)
    return tiny_run.train(config, workdir, stops)


@pytest.fixture
def folders(tmp_path, rng):
    (tmp_path / "text").mkdir()
    for i in range(40):  # two rows or less each, so that every step or two reads another
        letters = rng.choice(list("abcd"), size=rng.integers(20, 30))
        (tmp_path / "text" / f"{i}.txt").write_text("".join(letters))
    (tmp_path / "notes").mkdir()
    return f"{tmp_path / 'text'},{tmp_path / 'notes'},mor"


def read_documents(folders, process):
    return {int(i) for i in (Path(folders.split(",")[1]) / str(process)).read_text().split()}


def assert_same_curve(one, other):
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for line, expected in zip(one, other, strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("model", ["transformer", pytest.param("mor", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path, folders, model):
    """Until SIGTERM comes to the second, which stops both."""
    folders = folders.removesuffix("mor") + model
    config = watched_recipe.get_config(folders)
    pair = tmp_path / "pair"
    with processes(pair, [folders] * 2, stop_at="1:6") as started:
        outputs = [process.communicate() for process in started]
        assert [process.returncode for process in started] == [0, 0], outputs
    shares = [read_documents(folders, process) for process in (0, 1)]
    whole = train_to_step_8(config, tmp_path / "whole")

    (out, _), (other_out, _) = outputs
    lines = curve(pair)
    assert 0 < len(lines) < 8
    assert f"SIGTERM: stopped after step {len(lines)}, all saved" in out
    assert "on 2 x cpu of 2 processes" in out
    assert [line for line in other_out.splitlines() if not line.startswith("[Gloo]")] == []
    assert_same_curve(lines, curve(whole.workdir)[: len(lines)])

    streams = [{index % 4 for index in share} for share in shares]
    assert streams == [{0, 1}, {2, 3}]  # of documents, each of which makes one row of the four
    assert len(list((pair / "tensorboard").iterdir())) == 1
    assert {path.name for path in pair.iterdir()} == {
        *("checkpoints", "config.json", "loss.png", "metrics.jsonl", "tensorboard")
    }


@pytest.mark.slow
def test_one_process_goes_on_where_two_have_stopped(tmp_path, folders):
    config = watched_recipe.get_config(folders)
    with processes(tmp_path / "pair", [folders] * 2, stop_at="0:6") as started:
        outputs = [process.communicate() for process in started]
        assert [process.returncode for process in started] == [0, 0], outputs
    resumed = train_to_step_8(config, tmp_path / "pair")
    whole = train_to_step_8(config, tmp_path / "whole")
    assert_same_curve(curve(resumed.workdir), curve(whole.workdir))
    assert resumed.progress.tokens == whole.progress.tokens
    for (path, leaf), (_, expected) in zip(leaves(resumed.state), leaves(whole.state), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6, err_msg=str(path))


@pytest.mark.slow
def test_four_processes_on_two_axes_do_a_whole_run(tmp_path, folders):
    """Two of them hold the same rows and different parts of the parameters; all evaluate at the end."""
    config = watched_recipe.get_config(folders)
    config.mesh.update(data=2, tensor=2)
    with processes(tmp_path / "four", [folders] * 4, "--config.mesh.tensor=2") as started:
        outputs = [process.communicate() for process in started]
        assert [process.returncode for process in started] == [0] * 4, outputs
    # The first reads them all at the end, for the n-grams that losses are compared with.
    streams = [{index % 4 for index in read_documents(folders, process)} for process in range(4)]
    assert streams == [{0, 1, 2, 3}, {0, 1}, {2, 3}, {2, 3}]
    training.fit(config, tmp_path / "one")
    assert_same_curve(curve(tmp_path / "four"), curve(tmp_path / "one"))
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("four", "one")
    ]
    assert summaries[0].keys() == summaries[1].keys()
    for name in ("heldout_loss", "tokens", "flops_per_token", "unigram_bits_per_byte"):
        np.testing.assert_allclose(summaries[0][name], summaries[1][name], rtol=1e-5)
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("four", "one")
    ]
    assert reports[0]["token_depth"] == reports[1]["token_depth"]
    assert reports[0]["plots"] == reports[1]["plots"]
    with processes(
        tmp_path / "one", [folders] * 2, "--config.mesh.data=2", program="eval.py"
    ) as started:
        outputs = [process.communicate() for process in started]
        assert [process.returncode for process in started] == [0, 0], outputs
    assert "wrote" in outputs[0][0] and "wrote" not in outputs[1][0]
    again = json.loads((tmp_path / "one" / "report.json").read_text())
    np.testing.assert_allclose(again["heldout"]["loss"], reports[1]["heldout"]["loss"], rtol=1e-5)
    one, other = (checkpoint.restore_variables(tmp_path / name)[0] for name in ("four", "one"))
    for (path, leaf), (_, expected) in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6, err_msg=str(path))


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path, folders):
    """The second cannot read its text, and the first cannot go on without it."""
    wrong = folders.replace(f"{tmp_path / 'text'}", f"{tmp_path / 'nowhere'}")
    with processes(tmp_path / "run", [folders, wrong]) as (first, second):
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert err.splitlines()[-1].startswith("error: source 'text': paths is")
        first.communicate(timeout=60)
        assert first.returncode != 0


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}])
def test_one_process_makes_and_counts_every_row(rng, axes):
    share = Share.of(make_mesh(axes), 8)
    assert share.rows.tolist() == list(range(8))
    batch = {"tokens": rng.integers(9, size=(8, 3))}
    assert share.counted_rows(batch)["tokens"] is batch["tokens"]
    np.testing.assert_array_equal(share.on_devices(batch)["tokens"], batch["tokens"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "distributed.process_id is missing; valid: all of"),
        ((None, 2, 0), "distributed.coordinator_address is missing"),
        (("host", 2, 0), "distributed.coordinator_address='host'; valid: host:port"),
        (("host:99999", 2, 0), "'host:99999'; valid: host:port"),
        (("host:1", 0, 0), "distributed.num_processes=0; valid: 1 or more"),
        (("host:1", 2, 2), r"distributed.process_id=2; valid: 0 to num_processes - 1 = 1"),
        (("host:1", 2, -1), "distributed.process_id=-1"),
    ],
)
def test_wrong_arguments_are_one_message(arguments, message):
    with pytest.raises(ValueError, match=message), distributed.joined(*arguments):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed"], "error: distributed: no cluster was found"),
        (["--distributed.process_id=1"], "error: --distributed.process_id without --distributed"),
    ],
)
def test_wrong_flags_are_one_message(tmp_path, folders, flags, message):
    command = [
        sys.executable,
        ROOT / "train.py",
        f"--config={HERE / 'watched_recipe.py'}:{folders}",
    ]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)
