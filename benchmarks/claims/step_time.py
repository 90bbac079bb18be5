"""Training steps of several models timed in turn, so that a change of the machine's speed reaches all alike."""

import time
from collections.abc import Mapping

import jax
import ml_collections

from benchmarks import turns
from effjax import data, models, optim, registry
from effjax.training import config as configs
from effjax.training.state import initialise, initialiser
from effjax.training.step import make_train_step


def measure(named: Mapping[str, ml_collections.ConfigDict], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of a training step of each config, in each round."""
    # The round that does not count compiles.
    return turns.in_turn({name: _Step(config).run for name, config in named.items()}, rounds)


class _Step:
    def __init__(self, config: ml_collections.ConfigDict):
        resolved = configs.resolve(config)
        model = models.create(**resolved["model"])
        objective = registry.build("objective", resolved["objective"])
        optimizer, _ = optim.build(resolved["optimizer"], resolved["training"]["num_steps"])
        self._state = initialise(initialiser(model, optimizer, resolved))
        self._step = jax.jit(make_train_step(model, objective, optimizer), donate_argnums=0)
        batches = data.build(resolved["data"], split="train")
        self._batch = jax.device_put(next(batches))
        batches.close()

    def run(self) -> float:
        start = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._step(self._state, self._batch))
        return self._batch["tokens"].size / (time.perf_counter() - start)
