"""Types of arrays under `jax.shard_map`: which mesh axes a value varies over."""

import jax


def vary_alike(arrays):
    """Lets every array of a pytree vary over each mesh axis that one of them varies over.

    An op whose custom VJP meets a replicated argument beside a sharded one would return a gradient of another
    type than the argument. With the cast outside the custom VJP, JAX sums that gradient over the axis.
    Outside of `jax.shard_map` this does nothing.
    """
    axes = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(arrays)))

    def cast(x):
        missing = tuple(sorted(axes - _varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def shaped_like(x, shape=None, dtype=None) -> jax.ShapeDtypeStruct:
    """Shape and dtype, those of x unless given, of a kernel's output that varies over the mesh axes that x does."""
    aval = jax.typeof(x)
    axes = {_ATTRIBUTE: getattr(aval, _ATTRIBUTE)}
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, **axes)


def interpreter(interpret, x):
    """`interpret` as `pallas_call` takes it: the plain interpreter, the fast one, does not keep track of mesh axes."""
    if interpret is not True or not _varying_axes(x):
        return interpret
    from jax.experimental.pallas import tpu as pltpu  # slow to import

    return pltpu.InterpretParams()


# jax 0.12 moved `vma` into `manual_axis_type`.
_ATTRIBUTE = "manual_axis_type" if hasattr(jax.core.ShapedArray, "manual_axis_type") else "vma"


def _varying_axes(x) -> frozenset[str]:
    aval = jax.typeof(x)
    return aval.vma if _ATTRIBUTE == "vma" else aval.manual_axis_type.varying
