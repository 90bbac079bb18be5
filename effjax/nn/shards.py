"""Kernels on a mesh: each device runs them on the rows, heads and stretch of time that it holds.

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

    The rules in force (`nn.logical_axis_rules`) say over which mesh axes a logical axis is split; "batch-embed" is
    split over those of "batch" that do not split "embed". One that does not divide some dimension that it names is not
    split at all, and the log says so unless that is 1. Without a mesh of several devices, or where a device sees only
    its share already, the function is called as it is.

    Args:
      function: a function of arrays in which shares along the named axes have nothing to do with each other. For those
        along "length" the function has to see to it: where they are split it is given `axis_name`, the mesh axis.
      axes: for each argument the logical axes of its dimensions, "_" where it is whole: "batch _ heads _". A pytree of
        arrays takes a pytree of these, or one for all; None is passed on.
      out_axes: the same for the result.
    """

    @functools.wraps(function)
    def call(*arguments):
        mesh = jax.sharding.get_abstract_mesh()
        rules = _rules(mesh)
        if not _is_split(mesh, rules):
            return function(*arguments)
        given = (None if x is None else name for name, x in zip(axes, arguments, strict=True))
        names = jax.tree.broadcast(tuple(given), arguments)
        for name in _not_divided(names, arguments, rules, mesh):
            rules[name] = ()
        spec = functools.partial(_spec, rules)
        local, time = function, rules.get("length", ())
        if math.prod(mesh.shape[axis] for axis in time) > 1 and _is_named("length", names):
            (axis_name,) = time
            local = functools.partial(function, axis_name=axis_name)
        return jax.shard_map(
            local,
            in_specs=jax.tree.map(spec, names),
            out_specs=jax.tree.map(spec, out_axes),
            axis_names=set(_left(mesh)),
            # Within another shard_map the backward pass would ask for residuals along that one's axes too (jax 0.12).
            check_vma=AxisType.Manual not in mesh.axis_types,
        )(*arguments)

    return call


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """States which share of an array each device of the mesh in use works on; x as it is where `on_shards` calls as is.

    Args:
      x: an array.
      axes: the logical axes of its dimensions, as for `on_shards`. One that does not divide its dimension is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules = _rules(mesh)
    if not _is_split(mesh, rules):
        return x
    for name in _not_divided((axes,), (x,), rules, mesh):
        rules[name] = ()
    return jax.lax.with_sharding_constraint(x, _spec(rules, axes))


def is_split() -> bool:
    """Whether the compiler splits what is computed here over several devices, by the mesh and the rules in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return _is_split(mesh, _rules(mesh))


def num_parts(axis: str) -> int:
    """Parts that a logical axis is split into, by the mesh and the rules in use."""
    mesh = jax.sharding.get_abstract_mesh()
    rules = _rules(mesh)
    if not _is_split(mesh, rules):
        return 1
    return math.prod(mesh.shape[over] for over in rules.get(axis, ()))


def mesh_axis(axis: str) -> str:
    """The one mesh axis that a logical axis is split over."""
    (over,) = _rules(jax.sharding.get_abstract_mesh())[axis]
    return over


def _is_split(mesh, rules: dict) -> bool:
    """Whether a program is split over several devices by the compiler, along the axes that its author left to it."""
    if mesh.empty or AxisType.Explicit in mesh.axis_types:
        return False
    return bool(rules) and math.prod(mesh.shape[axis] for axis in _left(mesh)) > 1


def _left(mesh) -> tuple[str, ...]:
    """The mesh axes that the program is not written for the devices along, as in `jax.shard_map` it is."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind != AxisType.Manual)


def _rules(mesh) -> dict[str, tuple[str, ...]]:
    """The mesh axes that each logical axis is split over, as far as the mesh has them.

    An axis of one device is none: what is the same along all others would else have to be shown to be so along it.
    """
    rules, left = {}, _left(mesh)
    for axis, over in nn.get_logical_axis_rules():
        over = (over,) if isinstance(over, str) else over or ()
        if set(over) <= set(mesh.axis_names) and set(over) & set(left):
            rules[axis] = tuple(x for x in over if x in left and mesh.shape[x] > 1)
    return rules


def _over(rules: dict, name: str) -> tuple[str, ...]:
    """The mesh axes that `name` is split over, an axis or what is left of one: "batch-embed"."""
    if name in rules:
        return rules[name]
    axis, *others = name.split("-")
    taken = {x for other in others for x in rules.get(other, ())}
    return tuple(x for x in rules.get(axis, ()) if x not in taken)


def _spec(rules: dict, axes: str) -> PartitionSpec:
    return PartitionSpec(*(_over(rules, name) or None for name in axes.split()))


def _is_named(axis: str, names: tuple) -> bool:
    return any(axis in axes.split() for axes in jax.tree.leaves(names))


def _not_divided(names: tuple, arguments: tuple, rules: dict, mesh) -> set[str]:
    found = set()
    leaves = zip(jax.tree.leaves(names), jax.tree.leaves(arguments), strict=True)
    for axes, array in leaves:
        for name, size in zip(axes.split(), array.shape, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in _over(rules, name))
            if size % parts and name not in found:
                found.add(name)
                if size > 1:
                    _warn(name, size, parts)
    return found


@functools.cache
def _warn(name: str, size: int, parts: int) -> None:
    logger.warning("axis %r of size %d is kept whole: %d parts do not divide it", name, size, parts)
