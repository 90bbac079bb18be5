"""Arguments and cotangents of a custom VJP with `symbolic_zeros`: what is not differentiated is no array of zeros."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.varying import vary_alike


def values(arguments):
    """The arrays of what the forward of such a VJP is given, a pytree."""
    return jax.tree.map(lambda x: x.value, arguments)


def array_or_none(cotangent):
    """A cotangent as an array, or None for zeros."""
    return None if isinstance(cotangent, SymbolicZero) else cotangent


def as_array(cotangent, like):
    """A cotangent as an array, zeros too, which then vary over the mesh axes that the array `like` does."""
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    return vary_alike((jnp.zeros(cotangent.shape, cotangent.dtype), like))[0]
