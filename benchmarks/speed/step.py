"""The training step of a config by itself."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effjax import data
from effjax.training import lowering, sharding
from effjax.training.batches import Share

# Standard deviation of the parameters, as GPT-2's: routers choose, and nothing overflows.
_SCALE = 0.02


class Step:
    """The compiled step, random parameters, which take no program to make, and a batch of the config's data."""

    def __init__(self, config: Mapping[str, Any]):
        """Compiles; `config` is resolved."""
        mesh = sharding.make_mesh(config["mesh"])
        self._step = lowering.trace_config(config, mesh).lower().compile()
        shapes, rng = lowering.abstract_state(config, mesh), np.random.default_rng(0)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        state = zeros.replace(
            params=jax.tree.map(
                lambda x: rng.normal(0, _SCALE, x.shape).astype(x.dtype), shapes.params
            )
        )
        self._state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
        batches = data.build(config["data"], split="train")
        self._batch = Share.of(mesh, config["data"]["batch_size"]).on_devices(next(batches))
        batches.close()

    def seconds(self, steps: int = 1) -> float:
        """Of each of so many steps, one after the other."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / steps
