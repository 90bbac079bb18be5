"""Mixture-of-Recursions beside the plain and the recursive transformer, all with the same training FLOPs.

Bae et al., 2025, arXiv 2507.10524, section 3: at equal training FLOPs MoR has a lower validation loss than the
recursive transformer at every size; beside the plain one it is behind at the smallest (135M) and level or ahead at the
others, with about a third of the parameters.
"""

import statistics
from pathlib import Path

from benchmarks.claims import plot, step_time
from benchmarks.claims.bench import Bench, flops_per_step, steps_for
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from benchmarks.claims.spread import (
    bits_against,
    is_level,
    is_lower,
    mean,
    points,
    table,
)
from configs import mor, recursive, transformer

NAME = "mor"
MOR, VANILLA, RECURSIVE = "mor", "transformer", "recursive"
RECIPES = {VANILLA: transformer, RECURSIVE: recursive, MOR: mor}
D_MODEL, NUM_LAYERS, SEQ_LEN, BATCH_SIZE = 64, 5, 128, 8
# Of the plain transformer; the others make as many as have its FLOPs.
NUM_STEPS = 400
# For models this small twice the rate of the recipes.
LEARNING_RATE = 6e-3
# Other settings of the routing.
TRIED = {
    "mor, alpha 1": {"alpha": 1.0},
}
ROUNDS = 9
LOSS = "heldout_bits_per_byte"


def measure(bench: Bench) -> Report:
    """Trains the three with every seed, and other settings of MoR with the first."""
    named = {name: _config(bench, name) for name in RECIPES}
    budget = NUM_STEPS * flops_per_step(named[VANILLA])
    tried = {}
    for name, routing in TRIED.items():
        tried[name] = _config(bench, MOR)
        tried[name].model.depth.routing.update(routing)
    for config in (*named.values(), *tried.values()):
        config.training.num_steps = steps_for(budget, config)
    runs = bench.compare(NAME, named, lambda x: x.of_language_model(), tried)
    return {
        "setting": f"{NUM_LAYERS} layers of width {D_MODEL} (recursive: the first, one shared layer three times, the "
        f"last) over bytes of {bench.text}; {BATCH_SIZE} rows of {SEQ_LEN} bytes a step, AdamW at {LEARNING_RATE} with "
        f"all else as in the shipped recipes, the same {budget:.2e} training FLOPs for each.",
        "runs": runs,
        "tokens_per_second": step_time.measure(named, ROUNDS),
    }


def _config(bench, name):
    config = bench.on_text(RECIPES[name].get_config(), seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    config.model.update(d_model=D_MODEL, num_layers=NUM_LAYERS)
    config.optimizer.schedule.peak = LEARNING_RATE
    return config


def verdicts(report: Report) -> list[Verdict]:
    """Of the loss at equal FLOPs, of the loss at fewer parameters, and of the time of a step."""
    runs = report["runs"]
    lower = {name: is_lower(runs, MOR, name, LOSS) for name in (VANILLA, RECURSIVE)}
    share = mean(runs, MOR, "params") / mean(runs, VANILLA, "params")
    found = [
        Verdict(
            f"at equal training FLOPs, held-out loss below that of {name} with every seed",
            lower[name],
            bits_against(runs, MOR, name, LOSS),
        )
        for name in lower
    ]
    fewer = Verdict(
        "held-out loss at most 1 % above that of transformer, with fewer parameters",
        is_level(runs, MOR, VANILLA, LOSS) and share < 1,
        f"{share:.0%} of the parameters; {bits_against(runs, MOR, VANILLA, LOSS)}",
    )
    faster = [_speedup(report, name) for name in lower]
    time = Verdict(
        "more tokens a second in a training step than either baseline (steps in turn, median of the ratios)",
        min(faster) > 1,
        ", ".join(f"{x:.2f}x {name}" for x, name in zip(faster, lower, strict=True)),
    )
    return [*found, fewer, time]


def _speedup(report, name):
    times = report["tokens_per_second"]
    return statistics.median(x / y for x, y in zip(times[MOR], times[name], strict=True))


def tables(report: Report) -> list[Table]:
    """A row a model, those of one seed included."""
    columns = {
        "parameters": ("params", ",.0f"),
        "steps": ("steps", ".0f"),
        "training FLOPs": ("training_flops", ".2e"),
        "forward FLOPs a held-out token": ("flops_per_token", ",.0f"),
        "held-out bits per byte": (LOSS, ".3f"),
    }
    return [table(report["runs"], columns)]


def draw(report: Report, path: Path) -> None:
    """Loss against parameters, and against FLOPs a token of held-out text."""
    figure, axes = plot.panels(2)
    labels = {"params": "parameters", "flops_per_token": "forward FLOPs a held-out token"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        plot.dots(ax, points(report["runs"], key, LOSS), label, "held-out bits per byte")
    plot.save(figure, path)


CLAIM = Claim(
    "Mixture-of-Recursions: at equal training FLOPs a lower loss than plain and recursive transformers, with fewer "
    "parameters and a higher throughput",
    "2507.10524",
    measure,
    verdicts,
    tables,
    draw,
)
