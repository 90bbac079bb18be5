"""Sums of exponentials as pairs of a mantissa and an exponent: one pass over memory makes them, whatever the logits.

Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438: where every e^x is m 2^n with the two kept
apart, sums neither overflow nor underflow, and the pass over memory that looks for the maximum is not needed. Two
things differ here. The base is e and not 2: x - n is exact near the largest logit for every finite x, while in float32
x - n ln 2 loses digits from |x| of some 1e4 on, and logits of -1e30, of which masks are made, have no such n at all.
And all terms of a block, in cache or registers, have one exponent, the largest logit of the block: a term then costs
one exponential and no scaling, and blocks are added as pairs (the sum of Milakov and Gimelshein, arXiv 1805.02867).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Extended(NamedTuple):
    """The numbers m e^n, elementwise.

    Attributes:
        mantissa: m, float: 0 or positive.
        exponent: n, float, of m's shape.
    """

    mantissa: jax.Array
    exponent: jax.Array


def accumulator(dtype):
    """What sums of `dtype` are made in."""
    return jnp.promote_types(dtype, jnp.float32)


def zero(like) -> Extended:
    """0 in the shape of `like`, below every sum."""
    mantissa = jnp.zeros_like(like, accumulator(like.dtype))
    return Extended(mantissa, jnp.full_like(mantissa, jnp.finfo(mantissa.dtype).min))


def sum_of_exponentials(x) -> Extended:
    """Σ e^x over the last axis."""
    x = x.astype(accumulator(x.dtype))
    # Finite for a row of -inf too, whose sum is 0.
    exponent = jnp.maximum(x.max(axis=-1), jnp.finfo(x.dtype).min)
    return Extended(jnp.exp(x - exponent[..., None]).sum(axis=-1), exponent)


def add(a: Extended, b: Extended) -> Extended:
    """The sum, of the larger one's exponent."""
    exponent = jnp.maximum(a.exponent, b.exponent)
    scaled = (x.mantissa * jnp.exp(x.exponent - exponent) for x in (a, b))
    return Extended(sum(scaled), exponent)


def log(a: Extended):
    """The logarithm; +inf where a term was infinite, as `jax.nn.logsumexp` has it."""
    return jnp.where(a.exponent == jnp.inf, jnp.inf, a.exponent + jnp.log(a.mantissa))


def over(x, total: Extended):
    """e^x / total for x [..., V] and a total [...]: to the last digit also where e^x or the total are out of range."""
    x = x.astype(total.mantissa.dtype)
    return jnp.exp(x - total.exponent[..., None]) * (1 / total.mantissa)[..., None]
