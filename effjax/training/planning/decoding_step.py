"""The plan of decoding: one more token for each text of a batch, whose contexts are full."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax import models
from effjax.serving import decoding
from effjax.serving.sampling import PLAIN
from effjax.training import config as configs
from effjax.training import sharding
from effjax.training.planning import topologies
from effjax.training.planning.result import Plan, compile_or_refuse, of_program
from effjax.training.planning.schedules import forget

# A conditional of a recursion that some text takes; the tokens drawn do not change the cost.
_STOP_TOKENS = 1


def plan_decoding(
    config: Mapping[str, Any],
    topology: str,
    *,
    batch_size: int,
    context: int,
    schedules: Path | None = None,
) -> Plan:
    """The plan of a decoding step (`effjax.serving.decoding.advance`), with parameters as they are trained: float32.

    Parameters live where they do in training, and texts, with their caches, are split as rows of a batch are. A
    recursion that some texts skip is planned as if one text took it.

    Args:
      config: as `effjax.training.config.default` makes it.
      topology: as for `plan`.
      batch_size: texts.
      context: tokens that each has, the new one included.
      schedules: as for `plan`.

    Raises:
      ValueError: as `plan` does, or for a batch that the mesh does not divide, or a model that does not decode.
    """
    chip = topologies.chip(topology)
    mesh = topologies.mesh(topology, config["mesh"])
    sharding.check_rows("plan.decode_batch", batch_size, mesh)
    config = configs.resolve(config)
    model = decoding.served(models.create(**config["model"]))
    start = time.perf_counter()
    forget(schedules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        variables = sharding.abstract_state(functools.partial(_init, model), mesh)
        rows = _rows(model, batch_size, context, mesh)
        step = jax.jit(functools.partial(_advance, model), donate_argnums=1)
        traced = step.trace(variables, rows)
        compiled = compile_or_refuse(traced, variables["params"], None)
    return of_program(
        compiled,
        traced,
        what="decoding step",
        model=config["model"]["name"],
        topology=topology,
        mesh=mesh,
        chip=chip,
        host_link=topologies.host_link(topology),
        params=variables["params"],
        opt_state=None,
        settings={"batch_size": batch_size, "context": context},
        flops=_flops(model, context) * batch_size,
        tokens=batch_size,
        schedules=schedules,
        training_tokens=None,
        compile_seconds=time.perf_counter() - start,
    )


def _init(model: nn.Module) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def _advance(model: nn.Module, variables: Any, rows: decoding.Rows) -> decoding.Rows:
    stop_tokens = jnp.full((_STOP_TOKENS,), -1, jnp.int32)
    return decoding.advance(model, variables, rows, PLAIN.settings(), stop_tokens)


def _rows(model: nn.Module, batch_size: int, context: int, mesh: Mesh) -> decoding.Rows:
    """Types of texts in the making, each array split along the dimension that counts texts."""

    def empty(count: int) -> decoding.Rows:
        def make() -> decoding.Rows:
            numbers = jnp.zeros((count,), jnp.int32)
            return decoding.Rows(
                state=model.init_state(count, context),
                token=numbers,
                logprob=jnp.zeros((count,)),
                count=numbers,
                stopped=jnp.zeros((count,), bool),
                keys=jax.random.split(jax.random.key(0), count),
                seen=None,
            )

        return jax.eval_shape(make)

    def split(x, more):
        axes = (
            sharding.batch_sharding(mesh).spec[0] if one != other else None
            for one, other in zip(x.shape, more.shape, strict=True)
        )
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(split, empty(batch_size), empty(2 * batch_size))


def _flops(model: nn.Module, context: int) -> float:
    """Forward FLOPs of a token that passes every layer, with the keys that tokens of such a context meet on average."""
    ffn = 0.0 if model.ffn is None else model.ffn.flops_per_token(model.d_model)
    layers = model.stack().blocks
    mixers = sum(block.mixer.flops_per_token(model.d_model, context) for block in layers)
    head = model.head.flops_per_token(model.d_model, model.vocab_size)
    return mixers + len(layers) * ffn + head
