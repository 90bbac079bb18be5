"""What the training loop adds to a step: reading, counting and sending a batch, fetching, checking and logging metrics.

A step so small that the devices never make the host wait is done by the loop, and, in turns in the same process, by
calls of the same compiled program one after the other with one batch. The difference is the host's.
"""

import os
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import ml_collections
from rich.console import Console

from benchmarks.speed.step import Step
from effjax.training import config as configs
from effjax.training import sharding
from effjax.training.loop import Run
from effjax.training.progress import Screen

# Of a turn.
STEPS = 300


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds a step of the "loop" and of the "step" alone, in each round."""
    config = configs.resolve(tiny(rounds))
    mesh = sharding.make_mesh(config["mesh"])
    with (
        tempfile.TemporaryDirectory(prefix="effjax-host-") as workdir,
        open(os.devnull, "w") as nowhere,
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.AXIS_RULES),
    ):
        num_steps = config["training"]["num_steps"]
        screen = _Turns(num_steps, Step(config), Console(file=nowhere))
        with Run(config, Path(workdir), mesh, screen) as run:
            run.train()
    return {"loop": screen.loop[1:], "step": screen.step[1:]}  # the first turns warm up


def tiny(rounds: int) -> ml_collections.ConfigDict:
    """A run of so many turns, and one more, that logs as the recipes do."""
    config = configs.default("transformer", d_model=16, num_layers=1)
    config.data.update(seq_len=16, batch_size=2)
    config.mesh.data = 1
    num_steps = (rounds + 1) * STEPS
    config.training.update(num_steps=num_steps, eval_every=num_steps, checkpoint_every=num_steps)
    return config


class _Turns(Screen):
    """Times the loop, which tells it of each step, and lets the step alone have its turns in between."""

    def __init__(self, num_steps: int, alone: Step, console: Console):
        super().__init__(num_steps, console)
        self._alone = alone
        self._resumed = time.perf_counter()
        self.loop: list[float] = []
        self.step: list[float] = []

    def advance(self, step: int) -> None:
        super().advance(step)
        if step % STEPS == 0:
            self.loop.append((time.perf_counter() - self._resumed) / STEPS)
            self.step.append(self._alone.seconds(STEPS))
            self._resumed = time.perf_counter()
