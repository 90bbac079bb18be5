"""A target and its drafts, trained for a short while on the source of Python's standard library, byte by byte."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from effjax import data, models
from effjax.models import SequenceModel
from effjax.objectives import next_token
from effjax.serving import early_exit
from effjax.training.state import init_state
from effjax.training.step import make_train_step

SEQ_LEN, BATCH_SIZE = 128, 8
PEAK_LEARNING_RATE = 2e-3


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that has learnt something.

    Attributes:
      model: the model.
      variables: its variables.
      bits_per_byte: of the batches of the last tenth of the run, each of which it saw for the first time.
    """

    model: SequenceModel
    variables: Any
    bits_per_byte: float


def build(num_layers: int, d_model: int, max_seq_len: int) -> SequenceModel:
    """A transformer over bytes with two key heads."""
    heads = {"name": "attention", "num_heads": max(2, d_model // 64), "num_kv_heads": 2}
    size = {"num_layers": num_layers, "d_model": d_model, "max_seq_len": max_seq_len}
    return models.create("transformer", mixers=(heads,), **size)


def train(model: SequenceModel, num_steps: int, exit_layers: int | None = None) -> Trained:
    """Trains a model; with `exit_layers` such that its head can read that layer too.

    The loss is then the mean of those at the exit and at the end (LayerSkip, arXiv 2404.16710, section 4.1.2, with one
    exit that does not change).
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_LEARNING_RATE, num_steps // 10, num_steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    objective = next_token if exit_layers is None else _at_both_ends(exit_layers)
    state = init_state(model, optimizer, seq_len=SEQ_LEN, seed=0, ema=False)
    step = jax.jit(make_train_step(model, objective, optimizer), donate_argnums=0)
    batches = data.build({"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE}, split="train")
    losses = []
    what = f"training {model.num_layers} layers"
    for _ in track(range(num_steps), what, console=Console(stderr=True)):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["cross_entropy"]))
    last = np.mean(losses[-max(1, num_steps // 10) :])
    return Trained(model, state.variables(), float(last / np.log(2)))


def _at_both_ends(exit_layers: int) -> Callable:
    def objective(model, variables, batch, rng):
        shallow, shallow_variables = early_exit(model, variables, num_layers=exit_layers)
        early, _ = next_token(shallow, shallow_variables, batch, rng)
        loss, metrics = next_token(model, variables, batch, rng)
        return (early + loss) / 2, metrics

    return objective


def prompts(count: int, length: int) -> list[np.ndarray]:
    """Beginnings of lines in the middle of held-out files, of somewhat different lengths."""
    tokenizer = data.tokenizer({})
    found = []
    for text in data.documents({}, split="heldout"):
        middle = text.find(b"\n", len(text) // 2) + 1
        size = length - len(found) % 4
        if 0 < middle <= len(text) - size:
            found.append(np.asarray(tokenizer.encode(text[middle : middle + size])))
        if len(found) == count:
            return found
    raise ValueError(f"{len(found)} held-out files are long enough; valid: at least {count}")
