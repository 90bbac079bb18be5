"""The speed benchmark: its baselines cost what they say, and its page says what was measured."""

import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks.speed import first_step, headliners, host, imports
from benchmarks.speed.page import document, draw, table

LAYERS = {"mor": 5, "switch": 1, "matryoshka": 1}


def tiny(name):
    """A headliner of width 32 on short rows."""
    config = headliners.sized(headliners.RECIPES[name].get_config())
    config.model.update(d_model=32, num_layers=LAYERS[name])
    config.data.update(seq_len=16, batch_size=2)
    return config


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_baseline_has_as_many_parameters_in_the_same_depth(name):
    config = tiny(name)
    dense = headliners.dense(config, headliners.parameters)
    # Half of what a further multiple of the hidden width would add: three matrices a layer.
    most = config.model.num_layers * 3 * 32 * headliners.MULTIPLE / 2
    assert abs(headliners.parameters(dense) - headliners.parameters(config)) <= most
    assert dense.model.num_layers == config.model.num_layers
    assert dense.objective.name == config.objective.name


def test_a_baseline_spends_as_many_flops_as_a_token_that_sees_one_expert_of_eight():
    config = tiny("switch")
    spent = headliners.flops_per_token(config)
    dense = headliners.dense(config, headliners.flops_per_token)
    most = config.model.num_layers * 6 * 32 * headliners.MULTIPLE / 2
    assert abs(headliners.flops_per_token(dense) - spent) <= most
    assert 2 * headliners.parameters(dense) < headliners.parameters(config)


def test_a_model_cheaper_than_any_transformer_is_an_error():
    def cost(config):
        return 10 if config.model.name == "mor" else config.model.ffn.hidden_dim + 20

    with pytest.raises(ValueError, match="costs 10; valid: 28 or more"):
        headliners.dense(tiny("mor"), cost)


def test_the_turns_of_the_loop_and_of_the_step_alone(monkeypatch):
    monkeypatch.setattr(host, "STEPS", 4)
    found = host.measure(rounds=2)
    assert {name: len(seconds) for name, seconds in found.items()} == {"loop": 2, "step": 2}
    assert min(map(min, found.values())) > 0


def started(program):
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_the_output_of_a_run_says_how_far_it_is():
    lines = [
        "x with 1 parameters; starting in runs/x",
        "",
        "step 0: compiled the training step in 1 s",
    ]
    lines += ["step   1/150  loss 5.5", "never read"]
    program = f"print({'\n'.join(lines)!r})"
    with started(program) as run:
        times = first_step._times(run, 0.0)
    assert list(times) == list(first_step.PHASES)
    ends = pytest.raises(RuntimeError, match="before: step compiled; exit code 0")
    with started("print('starting in')") as run, ends:
        first_step._times(run, 0.0)


def of(measured):
    return {"measured": measured, "load": 0.5, "machine": "2 CPU cores"}


def test_the_page_has_medians_and_ratios_within_turns(tmp_path):
    cost = {"parameters": 1234, "flops_per_token": 5678.0}
    seconds = {
        "mor": [1.0, 4.0, 2.0],
        "equal parameters": [2.0, 2.0, 3.0],
        "equal FLOPs": [1.0] * 3,
    }
    wall = {"jax": [1.0, 2.0, 4.0], "effjax": [0.5, 0.5, 0.5]}
    report = {
        "imports": of(
            {n: dict.fromkeys(("wall", "cpu"), wall.get(n, [3.0] * 3)) for n in imports.PROGRAMS}
        ),
        "host": of({"loop": [0.003, 0.005, 0.004], "step": [0.001, 0.001, 0.002]}),
        "mor": of({n: cost | {"seconds_per_step": x} for n, x in seconds.items()}),
    }
    training = {
        "model": {"d_model": 384},
        "seconds_per_step": {"effjax": [1.0], "torch eager": [2.0]},
        "speed": {"effjax": 1.0, "torch eager": 2.0},
    }
    page = document(report, training)
    assert "| `import effjax` | 0.50 | 0.50 | 0.25 |" in page
    assert "| loop | 4.00 |" in page and "| host | 2.00 |" in page
    # 0.5 steps a second; 1.5 times the one and 0.5 times the other in the median turn.
    assert "| `mor` | 1,234 | 5,678 | 0.50 | 1.50 | 0.50 |" in page
    assert "| torch eager | 2000 | 2.00 |" in page
    assert "From the command" not in page and "`switch`" not in page
    console = Console(record=True, width=200)
    console.print(table(report))
    assert "steps/s 0.50, times the transformer of equal parameters 1.50" in console.export_text()
    draw(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000
