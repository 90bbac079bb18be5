"""BASED between a sliding window and full attention: recall against the size of the state, and loss on text.

Arora et al., 2024, arXiv 2402.18668, sections 3 and 6: recall grows with the state; linear attention beside a short
window recalls more than a longer window with a state of that size, and with a large feature dimension comes close to
full attention; on text, BASED matches a transformer.
"""

import itertools
import statistics
from pathlib import Path

from benchmarks.claims import plot
from benchmarks.claims.bench import Bench, Trained
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from benchmarks.claims.spread import (
    cell,
    deviation,
    differences,
    is_level,
    is_lower,
    mean,
    points,
    table,
    values,
)
from configs import based, transformer
from effjax import models
from effjax.models.state_size import state_size
from effjax.training import config as configs

NAME = "based"
# Recall. All models are a short convolution, a short window and one more mixer, which is what differs.
RECALL_D_MODEL, RECALL_SEQ_LEN, RECALL_BATCH_SIZE, RECALL_STEPS = 64, 24, 64, 900
NUM_PAIRS, VOCAB_SIZE, RECALL_RATE, NEAR = 4, 32, 3e-3, 4
WINDOWS, FEATURE_DIMS = (8, 16), (2, 4, 8)
ATTENTION = "attention"
ACCURACY, STATE = "accuracy", "state"
# Text. Six layers of the transformer have about the parameters of five of BASED.
D_MODEL, SEQ_LEN, BATCH_SIZE, NUM_STEPS, RATE = 64, 256, 4, 400, 6e-3
LAYERS = {"transformer": 6, "based": 5}
LOSS = "heldout_bits_per_byte"


def measure(bench: Bench) -> Report:
    """Trains on recall, a mixer each, and on text, BASED and the transformer, with every seed."""
    attention = {"name": "attention", "num_heads": 4}
    mixers = {ATTENTION: attention}
    mixers |= {_window(w): {"name": "sliding_window", "num_heads": 4, "window": w} for w in WINDOWS}
    mixers |= {_linear(d): {"name": "taylor_linear", "feature_dim": d} for d in FEATURE_DIMS}
    named = {name: _recall_config(mixer) for name, mixer in mixers.items()}
    states = {name: _state(config) for name, config in named.items()}
    recall = bench.compare(f"{NAME}-recall", named, _measured)
    for run in recall:
        run[STATE] = states[run["model"]]
    on_text = {
        name: _text_config(bench, name, recipe)
        for name, recipe in {"transformer": transformer, "based": based}.items()
    }
    return {
        "setting": f"Recall: {NUM_PAIRS} pairs in rows of {RECALL_SEQ_LEN} of {VOCAB_SIZE} tokens, {RECALL_STEPS} "
        f"steps of {RECALL_BATCH_SIZE} rows at {RECALL_RATE}; three layers of width {RECALL_D_MODEL} without "
        f"feed-forwards: a short convolution, a window of {NEAR} tokens, and the mixer that the table names. Text: "
        f"{bench.text}, {NUM_STEPS} steps of {BATCH_SIZE} rows of {SEQ_LEN} bytes, AdamW at {RATE}, width {D_MODEL}, "
        f"{LAYERS['based']} layers of BASED (convolution, linear attention, window, convolution, convolution) beside "
        f"{LAYERS['transformer']} of the transformer.",
        "recall": recall,
        "text": bench.compare(f"{NAME}-text", on_text, lambda x: x.of_language_model()),
    }


def _window(width):
    return f"window {width}"


def _linear(dim):
    return f"linear, feature_dim {dim}"


def _recall_config(mixer):
    near = {"name": "sliding_window", "num_heads": 4, "window": NEAR}
    config = configs.default(
        "based",
        d_model=RECALL_D_MODEL,
        num_layers=3,
        mixers=({"name": "short_conv"}, near, mixer),
        ffn=None,
    )
    task = {"num_pairs": NUM_PAIRS, "vocab_size": VOCAB_SIZE}
    config.data.source = configs.part_config("source", "associative_recall", **task)
    config.data.update(seq_len=RECALL_SEQ_LEN, batch_size=RECALL_BATCH_SIZE)
    config.optimizer.schedule.peak = RECALL_RATE
    config.training.num_steps = RECALL_STEPS
    config.evaluation.num_batches = 16
    return config


def _state(config) -> int:
    """Numbers that the model remembers of one row."""
    model = models.create(**configs.resolve(config.model))
    return state_size(model, RECALL_SEQ_LEN)[-1].numbers


def _measured(trained: Trained) -> dict[str, float]:
    return {
        ACCURACY: trained.summary["associative_recall_accuracy"],
        "params": trained.summary["params"],
    }


def _text_config(bench, name, recipe):
    config = bench.on_text(recipe.get_config(), seq_len=SEQ_LEN, batch_size=BATCH_SIZE)
    config.model.update(d_model=D_MODEL, num_layers=LAYERS[name])
    config.training.num_steps = NUM_STEPS
    config.optimizer.schedule.peak = RATE
    return config


def verdicts(report: Report) -> list[Verdict]:
    """Of recall at a state, of recall beside attention, and of the loss on text."""
    recall, text = report["recall"], report["text"]
    beaten = [
        w for w in WINDOWS if any(_wins(recall, _linear(d), _window(w)) for d in FEATURE_DIMS)
    ]
    widest = _linear(max(FEATURE_DIMS))
    gap = differences(recall, widest, ATTENTION, ACCURACY)
    allowed = max(0.01, deviation(values(recall, ATTENTION, ACCURACY)))
    dims = [mean(recall, _linear(d), ACCURACY) for d in FEATURE_DIMS]

    loss = cell(differences(text, "based", "transformer", LOSS), "+.3f")
    return [
        Verdict(
            "for every window there is a feature dimension with no larger state that recalls more with every seed",
            len(beaten) == len(WINDOWS),
            f"{len(beaten)} of {len(WINDOWS)} windows",
        ),
        Verdict(
            "recall grows with the feature dimension",
            all(a < b for a, b in itertools.pairwise(dims)),
            f"accuracies {', '.join(f'{x:.3f}' for x in dims)} at {', '.join(map(str, FEATURE_DIMS))}",
        ),
        Verdict(
            f"{widest} recalls what full attention does, to 0.01 or one standard deviation of its seeds",
            statistics.fmean(gap) >= -allowed,
            f"{cell(gap, '+.3f')} with {mean(recall, widest, STATE) / mean(recall, ATTENTION, STATE):.0%} of the state",
        ),
        Verdict(
            "on text, held-out loss at most 1 % above that of transformer",
            is_level(text, "based", "transformer", LOSS),
            f"{loss} bits per byte",
        ),
    ]


def _wins(runs, linear, window):
    no_larger = mean(runs, linear, STATE) <= mean(runs, window, STATE)
    return no_larger and is_lower(runs, window, linear, ACCURACY)


def tables(report: Report) -> list[Table]:
    """Recall, and loss on text."""
    of_recall = {
        "state (numbers)": (STATE, ",.0f"),
        "parameters": ("params", ",.0f"),
        "accuracy": (ACCURACY, ".3f"),
    }
    of_text = {
        "parameters": ("params", ",.0f"),
        "training FLOPs": ("training_flops", ".2e"),
        "held-out bits per byte": (LOSS, ".3f"),
    }
    return [table(report["recall"], of_recall), table(report["text"], of_text)]


def draw(report: Report, path: Path) -> None:
    """Accuracy against the size of the state, and loss on text against training FLOPs."""
    figure, (left, right) = plot.panels(2)
    named = points(report["recall"], STATE, ACCURACY)
    plot.dots(left, named, "state of a row (numbers)", "accuracy of recall")
    left.set_xscale("log")
    on_text = points(report["text"], "training_flops", LOSS)
    plot.dots(right, on_text, "training FLOPs", "held-out bits per byte")
    plot.save(figure, path)


CLAIM = Claim(
    "BASED: linear attention and a short window dial recall against the size of the state, up to that of attention, at "
    "the held-out loss of attention",
    "2402.18668",
    measure,
    verdicts,
    tables,
    draw,
)
