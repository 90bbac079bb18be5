"""AdaMoE beside a mixture of experts that gives every token two.

Zeng et al., 2024, arXiv 2406.13233, abstract and table 1: null experts save 14.5 % of the FLOPs of fine-tuned
Mixtral-8x7B at no loss of quality. Here both are trained from scratch. A mixture of one expert a token shows what
fewer FLOPs cost without null experts.
"""

from pathlib import Path

from benchmarks.claims import plot
from benchmarks.claims.bench import Bench, Trained
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from benchmarks.claims.spread import (
    bits_against,
    is_level,
    is_lower,
    mean,
    points,
    table,
)
from configs import adamoe
from effjax.training import config as configs

NAME = "adamoe"
TOP_2, TOP_1, ADAMOE = "top-2", "top-1", "adamoe, 2 of 8 + 2 null"
D_MODEL, NUM_LAYERS, SEQ_LEN, BATCH_SIZE, NUM_STEPS = 64, 3, 128, 8, 400
NUM_EXPERTS, HIDDEN_DIM = 8, 64
# For models this small twice the rate of the recipe.
LEARNING_RATE = 6e-3
LOSS, EXPERTS, FLOPS = "heldout_bits_per_byte", "experts_per_token", "expert_flops_per_token"


def measure(bench: Bench) -> Report:
    """Trains the three with every seed, and AdaMoE with other numbers of choices with the first."""
    named = {
        TOP_2: _config(bench, "top_k", top_k=2),
        TOP_1: _config(bench, "top_k", top_k=1, renormalise=False),
        ADAMOE: _config(bench, "adamoe", top_k=2, num_null=2),
    }
    tried = {
        "adamoe, 3 of 8 + 8 null": _config(bench, "adamoe", top_k=3, num_null=8),
        "adamoe, 4 of 8 + 8 null": _config(bench, "adamoe", top_k=4, num_null=8),
    }
    return {
        "setting": f"{NUM_LAYERS} layers of width {D_MODEL} with {NUM_EXPERTS} experts of hidden width {HIDDEN_DIM}, "
        f"over bytes of {bench.text}; {NUM_STEPS} steps of {BATCH_SIZE} rows of {SEQ_LEN} bytes, all from scratch, "
        f"AdamW at {LEARNING_RATE} with all else as in the shipped recipe. Of AdaMoE's settings with fewer experts a "
        "token than top-2, that which was best with the first seed has the others too.",
        "runs": bench.compare(NAME, named, _measured, tried),
    }


def _config(bench, ffn, **fields):
    config = bench.on_text(adamoe.get_config(), seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    config.model.update(d_model=D_MODEL, num_layers=NUM_LAYERS)
    size = {"num_experts": NUM_EXPERTS, "hidden_dim": HIDDEN_DIM}
    config.model.ffn = configs.part_config("ffn", ffn, **size, **fields)
    config.training.num_steps = NUM_STEPS
    config.optimizer.schedule.peak = LEARNING_RATE
    return config


def _measured(trained: Trained) -> dict[str, float]:
    """Experts' FLOPs are those of one expert times the experts that a token of held-out text got, in all layers."""
    metrics = trained.report["heldout"]["metrics"]
    experts = metrics["moe/mean_experts"]
    return trained.of_language_model() | {
        EXPERTS: experts,
        FLOPS: NUM_LAYERS * experts * 6 * D_MODEL * HIDDEN_DIM,
        "fraction_dropped": metrics["moe/fraction_dropped"],
    }


def verdicts(report: Report) -> list[Verdict]:
    """Of loss and FLOPs against top-2, and of the loss against top-1."""
    runs = report["runs"]
    saved = 1 - mean(runs, ADAMOE, FLOPS) / mean(runs, TOP_2, FLOPS)
    return [
        Verdict(
            "held-out loss at most 1 % above that of top-2, with fewer FLOPs of experts",
            is_level(runs, ADAMOE, TOP_2, LOSS) and saved > 0,
            f"{saved:.1%} of the experts' FLOPs saved; {bits_against(runs, ADAMOE, TOP_2, LOSS)}",
        ),
        Verdict(
            "held-out loss below that of one expert for every token, with every seed",
            is_lower(runs, ADAMOE, TOP_1, LOSS),
            bits_against(runs, ADAMOE, TOP_1, LOSS),
        ),
    ]


def tables(report: Report) -> list[Table]:
    """A row a model, those of one seed included."""
    columns = {
        "experts a token and layer": (EXPERTS, ".2f"),
        "forward FLOPs of experts a token": (FLOPS, ",.0f"),
        "fraction dropped": ("fraction_dropped", ".3f"),
        "held-out bits per byte": (LOSS, ".3f"),
    }
    return [table(report["runs"], columns)]


def draw(report: Report, path: Path) -> None:
    """Loss against the FLOPs of the experts."""
    figure, (ax,) = plot.panels(1)
    named = points(report["runs"], FLOPS, LOSS)
    plot.dots(ax, named, "forward FLOPs of experts a token", "held-out bits per byte")
    plot.save(figure, path)


CLAIM = Claim(
    "AdaMoE: with null experts, the loss of a mixture of two experts a token at fewer FLOPs",
    "2406.13233",
    measure,
    verdicts,
    tables,
    draw,
)
