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

# A matrix whose rows many chips share is gathered, and then multiplied by. By itself the compiler multiplies by one
# share of it after the other as they pass by: of 2048 rows on 256 chips a share has 8, which leave a unit of 128 idle.
# Gathering runs beside the work that does not wait for it; by itself the compiler gathers small shares by summing whole
# matrices that are zero but for a share, which takes twice the time, and nothing runs beside it.
_COMPILER_OPTIONS = {
    "tpu": {
        "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    }
}


def trace(
    model: nn.Module,
    objective: Any,
    optimizer: Any,
    training: Mapping[str, Any],
    state: TrainState,
    batch: Mapping[str, Any],
    mesh: Mesh,
) -> jax.stages.Traced:
    """The training step of these parts, traced for the mesh in use.

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
        skip_nonfinite=training["nonfinite"] == "skip",
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        update,
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=_COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )
    return step.trace(state, batch)


def lower_config(config: Mapping[str, Any], mesh: Mesh) -> jax.stages.Lowered:
    """The training step of a config, lowered. Arguments as for `trace_config`."""
    return trace_config(config, mesh).lower()


def trace_config(config: Mapping[str, Any], mesh: Mesh) -> jax.stages.Traced:
    """The training step of a config on a mesh, whose devices may be those of an absent TPU (`pallas_kernels.topology`).

    Nothing is allocated or run; what the step does with a batch of that shape does not depend on the text.

    Args:
      config: a resolved config.
      mesh: the mesh, with the axes of `sharding.MESH_AXES`.
    """
    model, training = models.create(**config["model"]), config["training"]
    optimizer, _ = optim.build(config["optimizer"], training["num_steps"])
    objective = registry.build("objective", config["objective"])
    state = abstract_state(config, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        batch = abstract_batch(config, mesh)
        return trace(model.at_step(0), objective, optimizer, training, state, batch, mesh)


def abstract_state(config: Mapping[str, Any], mesh: Mesh) -> TrainState:
    """The types of the state that a run of a resolved config starts from, with their shardings."""
    model, training = models.create(**config["model"]), config["training"]
    optimizer, _ = optim.build(config["optimizer"], training["num_steps"])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        init = initialiser(model, optimizer, config)
        return sharding.abstract_state(init, mesh, training["offload_optimizer"])


def abstract_batch(config: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The types of the batches that the config's data is made of, with their rows split over the mesh."""
    one_row = dict(config["data"]) | {"batch_size": 1, "shards": 1, "shuffle_window": 1}
    iterator = data.build(one_row, split="train")
    try:
        batch = next(iterator)
    finally:
        iterator.close()
    rows, where = config["data"]["batch_size"], sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=where)
        for name, x in batch.items()
    }
