"""Products on the matrix unit of a TPU."""

import jax
import jax.numpy as jnp


def dot(x, y, contracted):
    """A product with float32 sums; float32 operands are not rounded to the bfloat16 of the matrix unit.

    Args:
        x: one operand.
        y: the other.
        contracted: dimensions of either that are summed over, a tuple of each.
    """
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
