"""The plan of a training step: the very step that a run of the config compiles."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from effjax.training import config as configs
from effjax.training import lowering, sharding
from effjax.training.planning import model_flops, topologies
from effjax.training.planning.result import Plan, compile_or_refuse, of_program
from effjax.training.planning.schedules import forget


def plan(config: Mapping[str, Any], topology: str, schedules: Path | None = None) -> Plan:
    """The plan of a training step.

    Args:
      config: as `effjax.training.config.default` makes it; its mesh has to use all chips of the topology.
      topology: the machine: TPUs "v5p:8x8x8", "v5e:16x16", "v6e:4x4"; GPUs as hosts x GPUs of each, "h100:2x8"; "cpu",
        the CPU devices of this host.
      schedules: folder in which the TPU's compiler was told to leave its schedules (`schedules.leave`), from which the
        time of Pallas kernels is then known better.

    Raises:
      ValueError: for an unknown topology, or a config that cannot work on it.
    """
    chip = topologies.chip(topology)
    mesh = topologies.mesh(topology, config["mesh"])
    config = _checked(config, mesh)
    state = lowering.abstract_state(config, mesh)
    batch = lowering.abstract_batch(config, mesh)
    start = time.perf_counter()
    forget(schedules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        traced = lowering.trace_config(config, mesh)
        compiled = compile_or_refuse(traced, state.params, state.opt_state)
    data, training = config["data"], config["training"]
    return of_program(
        compiled,
        traced,
        what="training step",
        model=config["model"]["name"],
        topology=topology,
        mesh=mesh,
        chip=chip,
        host_link=topologies.host_link(topology),
        params=state.params,
        opt_state=state.opt_state,
        settings={
            "batch_size": data["batch_size"],
            "seq_len": data["seq_len"],
            "accumulation_steps": training["accumulation_steps"],
            "num_microbatches": config["model"]["num_microbatches"]
            if mesh.shape["pipeline"] > 1
            else None,
            "remat": config["model"]["remat"],
            "offload_optimizer": training["offload_optimizer"],
        },
        flops=model_flops.TRAINING
        * model_flops.forward_flops_per_token(config, batch)
        * model_flops.positions(batch),
        tokens=model_flops.positions(batch),
        schedules=schedules,
        training_tokens=float(training["num_steps"]) * model_flops.positions(batch),
        compile_seconds=time.perf_counter() - start,
    )


def _checked(config: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The resolved config, once it is known to work on the mesh."""
    config = configs.resolve(config) | {"mesh": dict(mesh.shape)}
    configs.check(config, list(mesh.devices.flat))
    return config
