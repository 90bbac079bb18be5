"""The command: its exit codes and what it says."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run

ROOT = Path(__file__).parents[2]


def command(workdir, text, *flags):
    config = workdir.parent / "recipe.py"
    config.write_text(
        "from tiny_run import make_config\n\n\n"
        f"def get_config():\n    return make_config({str(text)!r}, num_steps=100_000, log_every=1)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(tiny_run.__file__).parent)])
    }
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", f"--config={config}", f"--workdir={workdir}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow  # by default among two processes, in test_distributed
def test_sigterm_saves_and_exits_with_0(tmp_path, rng):
    text = tiny_run.write_text(tmp_path / "text", rng)
    process = command(tmp_path / "run", text)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "SIGTERM: stopped after step" in out
    step = int(out.rsplit("stopped after step ", 1)[1].split(",")[0])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


def test_another_config_is_one_message_and_exit_code_2(tmp_path, rng):
    text = tiny_run.write_text(tmp_path / "text", rng)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": {"name": "mor"}}')
    process = command(tmp_path / "run", text)
    _, err = process.communicate()
    assert process.returncode == 2
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: workdir")
    assert 'model.name (there: "mor", now: "transformer")' in message
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
