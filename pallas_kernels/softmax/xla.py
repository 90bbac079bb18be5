"""Softmax and cross-entropy in pure JAX: blocks of columns, added as numbers with an exponent apart.

A block is read from memory once, for its largest logit and its sum. The cross-entropy's backward computes the
probabilities again, from logits, mantissa and exponent, on the way to the gradient.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import extended
from pallas_kernels.softmax.extended import Extended, accumulator
from pallas_kernels.varying import vary_alike

# Columns of a block: a few dozen rows of it stay in the cache of a core.
BLOCK = 4096


@jax.custom_vjp
def softmax(x):
    """Over the last axis."""
    return extended.over(x, _total(x)).astype(x.dtype)


def _softmax_forward(x):
    y = softmax(x)
    return y, y


def _softmax_gradient(y, dy):
    """y (dy - Σ y dy / Σ y), in y's dtype: y as it was rounded need not sum to 1, and a y near 1 takes differences."""
    wide, d_wide = (x.astype(accumulator(y.dtype)) for x in (y, dy))
    mean = jnp.sum(wide * d_wide, axis=-1, keepdims=True) / jnp.sum(wide, axis=-1, keepdims=True)
    return (wide * (d_wide - mean)).astype(y.dtype)


softmax.defvjp(_softmax_forward, lambda y, dy: (_softmax_gradient(y, dy),))


def cross_entropy(logits, labels):
    """Returns `(loss [...], lse [...])`; see the package for the arguments."""
    return _cross_entropy(*vary_alike((logits, labels)))


@jax.custom_vjp
def _cross_entropy(logits, labels):
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits, labels):
    total = _total(logits)
    return loss_and_lse(total, logits_of(labels, logits)), (logits, labels, total)


def _cross_entropy_backward(saved, cotangents):
    logits, labels, total = saved
    return logits_gradient(logits, labels, total, *cotangents), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def capped(logits, soft_cap):
    """cap * tanh(logits / cap); None leaves them alone."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def loss_and_lse(total: Extended, label_logits):
    """From Σ e^logit and the logits of the labels. The loss takes these from the exponent first: both may be large."""
    return (total.exponent - label_logits) + jnp.log(total.mantissa), extended.log(total)


def logits_of(labels, logits):
    """The logit [...] of each label; 0 where the label is no column."""
    inside = (labels >= 0) & (labels < logits.shape[-1])
    found = jnp.take_along_axis(logits, jnp.where(inside, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(inside, found, 0).astype(accumulator(logits.dtype))


def logits_gradient(logits, labels, total: Extended, d_loss, d_lse):
    """p (d_loss + d_lse) - d_loss at the label, in the logits' dtype: one pass over the logits."""
    is_label = labels[..., None] == jax.lax.broadcasted_iota(
        labels.dtype, logits.shape, logits.ndim - 1
    )
    gradient = extended.over(logits, total) * (d_loss + d_lse)[..., None]
    return (gradient - jnp.where(is_label, d_loss[..., None], 0)).astype(logits.dtype)


def _total(x) -> Extended:
    """Σ e^x over the last axis."""

    whole, rest = divmod(x.shape[-1], BLOCK)

    def add_block(i, total, length=BLOCK):
        columns = jax.lax.dynamic_slice_in_dim(x, i * BLOCK, length, axis=-1)
        return extended.add(total, extended.sum_of_exponentials(columns))

    if whole == 0:
        return extended.sum_of_exponentials(x)
    total = jax.lax.fori_loop(0, whole, add_block, extended.zero(x[..., 0]))
    return add_block(whole, total, rest) if rest else total
