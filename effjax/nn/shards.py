"""Kernels on a mesh: each device runs them on the rows and heads that it holds.

The compiler splits what is written in its own operations, but not a kernel, which is a black box to it.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec

logger = logging.getLogger(__name__)


def on_shards(function: Callable, axes: tuple, out_axes: Any) -> Callable:
    """`function`, run by each device of the mesh in use on its own share of the arguments.

    The rules in force (`nn.logical_axis_rules`) say over which mesh axes a logical axis is split. One that does not
    divide some dimension that it names is not split at all, and the log says so. Without a mesh of several devices, or
    where a device sees only its share already, the function is called as it is.

    Args:
      function: a function of arrays in which shares along the named axes have nothing to do with each other.
      axes: for each argument the logical axes of its dimensions, "_" where it is whole: "batch _ heads _". A pytree of
        arrays takes a pytree of these, or one for all; None is passed on.
      out_axes: the same for the result.
    """

    @functools.wraps(function)
    def call(*arguments):
        mesh = jax.sharding.get_abstract_mesh()
        rules = {axis: to for axis, to in nn.get_logical_axis_rules() if to is not None}
        auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
        if mesh.empty or mesh.size == 1 or not rules or not auto:
            return function(*arguments)
        given = (None if x is None else name for name, x in zip(axes, arguments, strict=True))
        names = jax.tree.broadcast(tuple(given), arguments)
        for name in _not_divided(names, arguments, rules, mesh):
            del rules[name]
        spec = functools.partial(_spec, rules)
        return jax.shard_map(
            function, in_specs=jax.tree.map(spec, names), out_specs=jax.tree.map(spec, out_axes)
        )(*arguments)

    return call


def _spec(rules: dict, axes: str) -> PartitionSpec:
    return PartitionSpec(*(rules.get(name) for name in axes.split()))


def _not_divided(names: tuple, arguments: tuple, rules: dict, mesh) -> set[str]:
    found = set()
    leaves = zip(jax.tree.leaves(names), jax.tree.leaves(arguments), strict=True)
    for axes, array in leaves:
        for name, size in zip(axes.split(), array.shape, strict=True):
            split_over = rules.get(name, ())
            split_over = (split_over,) if isinstance(split_over, str) else split_over
            parts = math.prod(mesh.shape[axis] for axis in split_over)
            if size % parts and name not in found:
                found.add(name)
                _warn(name, size, parts)
    return found


@functools.cache
def _warn(name: str, size: int, parts: int) -> None:
    logger.warning(
        "axis %r of size %d is kept whole in a kernel: %d parts do not divide it", name, size, parts
    )
