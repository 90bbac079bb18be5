"""The record of a run's config: it comes back, and another config is refused by what differs."""

import json

import ml_collections
import pytest

from effjax import run_config
from effjax.checkpoint import CheckpointError


def make_config():
    config = ml_collections.ConfigDict({"seed": 0, "model": {"name": "mor", "d_model": 16}})
    config.model.mixers = (ml_collections.ConfigDict({"name": "attention", "window": None}),)
    config.training = {"num_steps": 10, "log_every": 5, "ema_decay": None}
    config.training.ema_decay = ml_collections.config_dict.placeholder(float)
    config.mesh = {"data": -1}
    return config


def test_config_comes_back(tmp_path):
    config = make_config()
    config.model.ffn_width = 3 * config.model.get_ref("d_model")
    run_config.save(tmp_path, config)
    loaded = run_config.load(tmp_path)
    assert loaded.model.ffn_width == 48
    assert loaded.model.mixers[0]["window"] is None
    assert loaded.training.ema_decay is None
    assert json.loads((tmp_path / "config.json").read_text())["mesh"] == {"data": -1}


def test_a_config_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        run_config.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model":')
    with pytest.raises(CheckpointError, match="is damaged"):
        run_config.load(tmp_path)


def test_a_run_may_change_its_length_intervals_and_mesh(tmp_path):
    config = make_config()
    run_config.check_same_run(tmp_path, config)  # nothing there
    run_config.save(tmp_path, config)
    config.training.num_steps, config.training.log_every, config.mesh.data = 20, 1, 2
    run_config.check_same_run(tmp_path, config)


def test_a_field_that_was_not_there_when_the_run_began_was_off_then(tmp_path):
    config = make_config()
    run_config.save(tmp_path, config)
    config.model.added = False
    run_config.check_same_run(tmp_path, config)
    config.model.added = True
    with pytest.raises(CheckpointError, match=r"model.added \(there: absent, now: true\)"):
        run_config.check_same_run(tmp_path, config)


def test_another_config_is_refused_by_every_field_that_differs(tmp_path):
    config = make_config()
    run_config.save(tmp_path, config)
    config.model.d_model, config.training.ema_decay, config.model.num_layers = 32, 0.9, 2
    with pytest.raises(CheckpointError) as raised:
        run_config.check_same_run(tmp_path, config)
    message = str(raised.value)
    assert "model.d_model (there: 16, now: 32)" in message
    assert "training.ema_decay (there: null, now: 0.9)" in message
    assert "model.num_layers (there: absent, now: 2)" in message


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        run_config.check_same_run(tmp_path, make_config())
