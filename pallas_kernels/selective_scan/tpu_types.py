"""Types of what a TPU kernel returns, and the interpreter that knows them, under `jax.shard_map`."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


def shaped_like(x, shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """The type of an output that varies over the mesh axes of `jax.shard_map` that x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, **_varying(x))


def interpreter(interpret, x):
    """`interpret` as `pallas_call` takes it: the plain interpreter, the fast one, does not keep track of mesh axes."""
    if interpret is True and _varying(x) != _varying(jnp.zeros(())):
        return pltpu.InterpretParams()
    return interpret


def _varying(x) -> dict:
    aval = jax.typeof(x)
    # jax 0.12 moved `vma` into `manual_axis_type`.
    name = "manual_axis_type" if hasattr(aval, "manual_axis_type") else "vma"
    return {name: getattr(aval, name)}
