"""Pipelines: layers cut into stages, each on devices of its own, that work on different micro-batches at a time.

Micro-batches pass the stages one behind the other, forward and then backward (GPipe; Huang et al., 2019, arXiv
1811.06965). Of the M + S - 1 steps that M micro-batches take through S stages, each stage has no work in S - 1: a
fraction of (S - 1) / (M + S - 1), the bubble, in which its devices compute what nobody asks for.

The schedule is written for the devices of a stage (`jax.shard_map` over the mesh axis of stages). What a stage computes
is left to the compiler to split over the other axes of the mesh; the backward pass is what autodiff makes of all that.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from effjax.nn import scalars, shards

logger = logging.getLogger(__name__)

STAGE = "stage"  # the logical axis that says over which mesh axis layers are split


def num_stages() -> int:
    """S on the mesh in use; 1 if that has no axis for them."""
    return shards.num_parts(STAGE)


def takes(num_rows: int, num_repeats: int, num_microbatches: int) -> bool:
    """Whether layers are a pipeline on the mesh in use: it has stages, and both the layers and the rows divide.

    If they do not, the log says why, and all devices apply all layers to rows of their own.

    Args:
      num_rows: B.
      num_repeats: L, repeats of the pattern of layers.
      num_microbatches: M.
    """
    size = num_stages()
    if size == 1:
        return False
    held = shards.num_parts("batch") // size * num_microbatches
    for what, count, parts in (
        ("micro-batches", num_microbatches, size),
        ("repeats of the layers", num_repeats, size),
        ("rows", num_rows, held),
    ):
        if count < 1 or count % parts:
            _say(f"no pipeline for {count} {what}: they do not divide into {parts}")
            return False
    return True


def run(stage: Callable, weights: Any, rows: Any, num_microbatches: int) -> tuple[Any, Any]:
    """Takes the rows of a batch through all stages, of which the mesh in use has S.

    Micro-batches that wait, and those that are done, lie on the devices that hold their rows outside of the pipeline.
    At each step the devices of a stage hand what they made to those of the next, and what waits there first to those
    of the stage before, so that the first stage has the next micro-batch and the last a place for what is done.

    Args:
      stage: `(step, weights, rows) -> (rows, report)` of the rows [b, T, ...] of one micro-batch and of the stage's
        share of the weights. What it gets and gives of rows are arrays of the same shapes.
      weights: a pytree of arrays [L, ...], of which each stage has the next L / S.
      rows: a pytree of arrays [B, T, ...].
      num_microbatches: M, a multiple of S.

    Returns:
      (rows as the last stage gives them, the reports of all stages about micro-batches, arrays [S, M, ...]).
    """
    axis = shards.mesh_axis(STAGE)
    own = PartitionSpec(axis)
    stream = jax.tree.map(lambda x: split(x, num_microbatches), rows)
    local = functools.partial(_run_stage, stage, axis, num_microbatches)
    stream, reports = jax.shard_map(
        local, in_specs=(own, own), out_specs=(own, own), axis_names={axis}, check_vma=False
    )(weights, stream)
    return jax.tree.map(merge, stream), reports


def _run_stage(stage, axis, num_microbatches, weights, stream):
    """What the devices of one stage do; `stream` [1, M / S, b, T, ...] is what waits there."""
    size, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    slots = num_microbatches // size
    onward = functools.partial(_pass, axis, [(s, s + 1) for s in range(size - 1)])
    back = functools.partial(_pass, axis, [(s + 1, s) for s in range(size - 1)])

    def step(carry, t):
        results, stream = carry
        slot = t % slots
        waiting = jax.tree.map(lambda x: x[slot], stream)
        given = jax.tree.map(_constrain, _where(index == 0, waiting, onward(results)))
        results, report = stage(t, weights, given)
        left = _where(index == size - 1, results, back(waiting))
        stream = jax.tree.map(lambda x, new: x.at[slot].set(new), stream, left)
        return (results, stream), report

    stream = jax.tree.map(lambda x: x[0], stream)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x[0]), stream)
    (_, stream), reports = jax.lax.scan(
        step, (nothing, stream), jnp.arange(num_microbatches + size - 1)
    )
    # Micro-batch m is done at step m + S - 1 and lies in the slot of that step; stage s had it at step m + s.
    stream = jax.tree.map(lambda x: jnp.roll(x, 1 - size, axis=0)[None], stream)
    mine = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=index, slice_size=num_microbatches
    )
    return stream, jax.tree.map(lambda x: mine(x)[None], reports)


def split(rows: Shaped[Array, "B T ..."], num_microbatches: int) -> Shaped[Array, "S N b T ..."]:
    """Rows as micro-batches, of which N = M / S wait at each stage. No row leaves the device that holds it."""
    size = num_stages()
    slots, held = num_microbatches // size, shards.num_parts("batch") // size
    micro = jnp.swapaxes(rows.reshape(size, held, slots, -1, *rows.shape[1:]), 1, 2)
    return micro.reshape(size, slots, -1, *rows.shape[1:])


def merge(stream: Shaped[Array, "S N b T ..."]) -> Shaped[Array, "B T ..."]:
    """The inverse of `split`."""
    size, slots, _, *rest = stream.shape
    micro = stream.reshape(size, slots, shards.num_parts("batch") // size, -1, *rest)
    return jnp.swapaxes(micro, 1, 2).reshape(-1, *rest)


def of_batch(reports: scalars.Scalars, segment_ids: Int[Array, "B T"]) -> scalars.Scalars:
    """The report about a batch, from those of all stages about its micro-batches.

    Each counts by its tokens, so a mean over tokens is that of the whole batch. A loss that is none, such as the
    product of two means that balances the load of experts, is the mean of those of the micro-batches, as it is where
    gradients are accumulated.

    Args:
      reports: arrays [S, M, ...], as from `run`.
      segment_ids: of the batch; 0 is padding.
    """
    report = scalars.collapse(reports)
    num_microbatches = len(jax.tree.leaves(report)[0])
    tokens = jnp.sum(split(segment_ids, num_microbatches) > 0, axis=(2, 3)).reshape(-1)
    weights = tokens / jnp.maximum(jnp.sum(tokens), 1)
    size = num_stages()
    return {
        name: merge(x.reshape(size, -1, *x.shape[1:]))
        if name.startswith("token/")
        else jnp.sum(weights * x)
        for name, x in report.items()
    }


def _constrain(rows: Shaped[Array, "b T ..."]) -> Array:
    return shards.constrain(rows, " ".join(["batch", "length", *"_" * (rows.ndim - 2)]))


@functools.cache
def _say(what: str) -> None:
    logger.warning(what)


def _pass(axis: str, pairs: list[tuple[int, int]], arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), arrays)


def _where(condition: Array, these: Any, those: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, those)
