"""One number for many arrays, by which to know them again after a disk has had them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def digest(tree: Any) -> int:
    """A number that any flipped bit of any array changes, whatever the shardings: sums of their bits modulo 2^32.

    Raises:
      FloatingPointError: if an array has an element that is not finite, naming the arrays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    checked = jax.device_get(_sums_of_bits([leaf for _, leaf in leaves]))
    poisoned = [
        jax.tree_util.keystr(path)
        for (path, _), (_, is_finite) in zip(leaves, checked, strict=True)
        if not is_finite
    ]
    if poisoned:
        raise FloatingPointError(f"not finite: {', '.join(poisoned)}")
    # Arrays are not interchangeable, so their sums are not simply added.
    return functools.reduce(lambda total, one: (31 * total + int(one[0])) % 2**32, checked, 0)


@jax.jit
def _sums_of_bits(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return [_sum_of_bits(x) for x in arrays]


def _sum_of_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = x.astype(unsigned) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    return jnp.sum(bits, dtype=jnp.uint32), finite
