"""Switch Transformer beside the dense transformer with the same FLOPs a token.

Fedus et al., 2021, arXiv 2101.03961, figure 1 and section 3.1: at the FLOPs of a dense model, more experts, of which a
token takes one, give a lower loss after the same steps.
"""

from pathlib import Path

from benchmarks.claims import plot
from benchmarks.claims.bench import Bench, Trained
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from benchmarks.claims.spread import cell, differences, is_lower, mean, points, table
from configs import switch
from effjax.training import config as configs

NAME = "switch"
DENSE, SWITCH = "dense", "switch, 8 experts"
D_MODEL, NUM_LAYERS, SEQ_LEN, BATCH_SIZE, NUM_STEPS = 64, 3, 128, 8, 400
HIDDEN_DIM = 128
# For models this small twice the rate of the recipe.
LEARNING_RATE = 6e-3
LOSS = "heldout_bits_per_byte"


def measure(bench: Bench) -> Report:
    """Trains both with every seed, and Switch with wider initialisers with the first."""
    named = {
        DENSE: _config(bench, "dense", activation="relu"),
        SWITCH: _config(bench, "switch", num_experts=8),
    }
    tried = {"switch, init_scale 1": _config(bench, "switch", num_experts=8, init_scale=1.0)}
    return {
        "setting": f"{NUM_LAYERS} layers of width {D_MODEL} with feed-forwards of hidden width {HIDDEN_DIM} (ReLU), "
        f"one or eight of which a token takes one, over bytes of {bench.text}; {NUM_STEPS} steps of {BATCH_SIZE} rows "
        f"of {SEQ_LEN} bytes, AdamW at {LEARNING_RATE} with all else as in the shipped recipe.",
        "runs": bench.compare(NAME, named, _measured, tried),
    }


def _config(bench, ffn, **fields):
    config = bench.on_text(switch.get_config(), seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    config.model.update(d_model=D_MODEL, num_layers=NUM_LAYERS)
    config.model.ffn = configs.part_config("ffn", ffn, hidden_dim=HIDDEN_DIM, **fields)
    config.training.num_steps = NUM_STEPS
    config.optimizer.schedule.peak = LEARNING_RATE
    return config


def _measured(trained: Trained) -> dict[str, float]:
    metrics = trained.report["heldout"]["metrics"]
    dropped = metrics.get("moe/fraction_dropped", 0.0)
    return trained.of_language_model() | {"fraction_dropped": dropped}


def verdicts(report: Report) -> list[Verdict]:
    """Of the loss at equal FLOPs a token and equal steps."""
    runs = report["runs"]
    ratio = mean(runs, SWITCH, "training_flops") / mean(runs, DENSE, "training_flops")
    by = cell(differences(runs, SWITCH, DENSE, LOSS), "+.3f")
    return [
        Verdict(
            "after the same steps, at no more than 2 % more FLOPs (the router's), held-out loss below that of the "
            "dense model with every seed",
            is_lower(runs, SWITCH, DENSE, LOSS) and ratio <= 1.02,
            f"{by} bits per byte at {ratio:.3f} times the training FLOPs",
        )
    ]


def tables(report: Report) -> list[Table]:
    """A row a model, those of one seed included."""
    columns = {
        "parameters": ("params", ",.0f"),
        "training FLOPs": ("training_flops", ".3e"),
        "fraction dropped": ("fraction_dropped", ".3f"),
        "held-out bits per byte": (LOSS, ".3f"),
    }
    return [table(report["runs"], columns)]


def draw(report: Report, path: Path) -> None:
    """Loss against parameters."""
    figure, (ax,) = plot.panels(1)
    plot.dots(ax, points(report["runs"], "params", LOSS), "parameters", "held-out bits per byte")
    plot.save(figure, path)


CLAIM = Claim(
    "Switch Transformer: at equal FLOPs a token a lower loss than the dense model",
    "2101.03961",
    measure,
    verdicts,
    tables,
    draw,
)
