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


def _varying_axes(x) -> frozenset[str]:
    aval = jax.typeof(x)
    # jax 0.12 moved `vma` into `manual_axis_type`.
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma
