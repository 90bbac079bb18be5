"""The program of a training step: what a run compiles, and the same for devices that need not be here."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax import data, models, optim, registry
from effjax.training import sharding
from effjax.training.state import TrainState, initialiser
from effjax.training.step import make_train_step


def lower(
    model: nn.Module,
    objective: Any,
    optimizer: Any,
    training: Mapping[str, Any],
    state: TrainState,
    batch: Mapping[str, Any],
    mesh: Mesh,
) -> jax.stages.Lowered:
    """The training step of these parts, lowered for the mesh in use.

    Args:
      model, objective, optimizer: the parts.
      training: the `training` section of a config.
      state: the state before the step, arrays or their types; its arrays are donated.
      batch: the batch, arrays or their types.
      mesh: the mesh, which is in force with the logical axis rules.
    """
    update = make_train_step(
        model,
        objective,
        optimizer,
        accumulation_steps=training["accumulation_steps"],
        ema_decay=training["ema_decay"],
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(update, out_shardings=(shardings, whole), donate_argnums=0)
    return step.lower(state, batch)


def lower_config(config: Mapping[str, Any], mesh: Mesh) -> jax.stages.Lowered:
    """The training step of a config on a mesh, whose devices may be those of an absent TPU (`pallas_kernels.topology`).

    Nothing is allocated or run; what the step does with a batch of that shape does not depend on the text.

    Args:
      config: a resolved config.
      mesh: the mesh, with the axes of `sharding.MESH_AXES`.
    """
    model, training = models.create(**config["model"]), config["training"]
    optimizer, _ = optim.build(config["optimizer"], training["num_steps"])
    objective = registry.build("objective", config["objective"])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        state = sharding.abstract_state(initialiser(model, optimizer, config), mesh)
        batch = _abstract_batch(config, mesh)
        return lower(model.at_step(0), objective, optimizer, training, state, batch, mesh)


def _abstract_batch(config: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The types of the batches that the config's data is made of."""
    iterator = data.build(dict(config["data"]) | {"shuffle_window": 1}, split="train")
    try:
        batch = next(iterator)
    finally:
        iterator.close()
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch.items()
    }
