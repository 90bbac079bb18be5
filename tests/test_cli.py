"""Command lines: what they can set, and what is said when they are wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from effjax import cli

ROOT = Path(__file__).parents[1]

RECIPE = """
import ml_collections
from ml_collections import config_dict


def get_config(size=None):
    if size == "huge":
        raise ValueError("size is 'huge'; valid: small")
    if size == "broken":
        return 1 / 0
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.fraction = 0.5
    config.fast = True
    config.name = "mor"
    config.window = None
    config.decay = config_dict.placeholder(float)
    config.depth = {"num_recursions": 3, "sharing": "cycle"}
    config.mixers = (ml_collections.ConfigDict({"heads": 4}),)
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def parse(*arguments):
    """The config that a command line gives, with flags of its own."""
    argv = ["program", *map(str, arguments)]
    flag_values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder.", flag_values=flag_values)
    holder = cli.define_config("A config.", flag_values, argv)
    cli.parse_flags(argv, flag_values)
    return holder.value


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("seed=3", "seed", 3),
        ("fraction=2", "fraction", 2.0),
        ("fast=false", "fast", False),
        ("name=based", "name", "based"),
        ("window=64", "window", 64),
        ("window=(1, 2)", "window", (1, 2)),
        ("window=text", "window", "text"),
        ("decay=0.9", "decay", 0.9),
        ("seed=none", "seed", None),
        ("name=none", "name", "none"),
        ("decay=none", "decay", None),
        ("window=none", "window", None),
        ("fast=none", "fast", None),
        ("depth.num_recursions=5", "depth.num_recursions", 5),
    ],
)
def test_every_field_can_be_set(recipe, flag, field, value):
    config = parse(f"--config={recipe}", f"--config.{flag}")
    for key in field.split("."):
        config = config[key]
    assert config == value
    assert type(config) is type(value)


def test_fields_within_tuples_can_be_set(recipe):
    config = parse(f"--config={recipe}", "--config.mixers[0].heads=2")
    assert config.mixers[0].heads == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.dept.sharing=x"], "unknown field of config: 'dept'; did you mean 'depth'?"),
        (
            ["--config.depth.num_recursion=3"],
            "unknown field of config.depth: 'num_recursion'; did you mean 'num_recursions'? "
            "(known: num_recursions, sharing)",
        ),
        (["--config.mixers[0].head=2"], "unknown field of config.mixers[0]: 'head'"),
        (["--config.seed.x=3"], "--config.seed.x: config.seed is 0, which has no fields"),
        (["--config.seed=three"], "--config.seed is 'three'; valid: int or none, such as 0"),
        (["--config.seed", "three"], "--config.seed is 'three'; valid: int or none, such as 0"),
        (["--config.seed=1.5"], "--config.seed is '1.5'; valid: int"),
        (["--config.fraction=half"], "--config.fraction is 'half'; valid: float"),
        (["--config.fast=maybe"], "--config.fast is 'maybe'; valid: bool"),
        (["--config.decay=slow"], "--config.decay is 'slow'; valid: float or none"),
        (
            ["--config.depth=3"],
            "--config.depth is '3'; valid: a dict, or set one of num_recursions",
        ),
        (["--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
        (["--workdir"], "Missing value for flag --workdir"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_flag_is_one_message(recipe, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(f"--config={recipe}", *arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{folder}/recipes.py", "did you mean '{folder}/recipe.py'? (known: {folder}/recipe.py)"),
        ("{folder}", "unknown config file '{folder}'"),
        ("{folder}/recipe.py:huge", "recipe.py:huge: size is 'huge'; valid: small"),
        ("{folder}/recipe.py:broken", "recipe.py:broken: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_config_is_one_message(recipe, config, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--config=" + config.format(folder=recipe.parent))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.format(folder=recipe.parent) in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_a_field_without_a_config_is_one_message(capsys):
    with pytest.raises(SystemExit):
        parse("--config.seed=3")
    assert capsys.readouterr().err.startswith("error: --config.seed without a config")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("field is 3; valid: 4"), "error: field is 3; valid: 4\n"),
        (FloatingPointError("loss is nan"), "error: loss is nan\n"),
        (FileNotFoundError(2, "No such file", "x"), "error: FileNotFoundError: [Errno 2]"),
    ],
)
def test_a_users_error_is_one_message(error, message, capsys):
    with pytest.raises(SystemExit) as exit, cli.one_message():
        raise error
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(SystemExit), cli.one_message(debug=True):
        raise ValueError("wrong")
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("error: wrong\n")


def test_an_interrupt_is_not_an_error(capsys):
    with pytest.raises(SystemExit) as exit, cli.one_message():
        raise KeyboardInterrupt
    assert exit.value.code == 130
    assert "error" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(TypeError, match="bug"), cli.one_message():
        raise TypeError("bug")


def test_eval_of_a_workdir_that_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "eval.py", f"--workdir={tmp_path / 'nowhere'}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    errors = done.stderr.splitlines()
    assert errors[-1].startswith("error: ")
    assert "nowhere" in errors[-1]
    assert "Traceback" not in done.stderr
