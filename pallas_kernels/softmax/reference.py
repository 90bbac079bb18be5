"""Softmax and cross-entropy written out, in the dtype of the inputs (float64 too), with JAX's own derivatives."""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax.extended import accumulator


def softmax(x):
    """Over the last axis."""
    return jax.nn.softmax(x.astype(accumulator(x.dtype)), axis=-1).astype(x.dtype)


def cross_entropy(logits, labels):
    """Returns `(loss [...], lse [...])`; see the package for the arguments."""
    logits = logits.astype(accumulator(logits.dtype))
    lse = jax.nn.logsumexp(logits, axis=-1)
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    log_probability = jnp.sum(jnp.where(is_label, jax.nn.log_softmax(logits), 0), axis=-1)
    return jnp.where(is_label.any(axis=-1), -log_probability, lse), lse


def linear_cross_entropy(hidden, weight, labels, *, logits_soft_cap, chunk_size):
    """The same of the logits hidden @ weight, with their soft cap."""
    del chunk_size
    dtype = accumulator(hidden.dtype)
    logits = jnp.matmul(hidden.astype(dtype), weight.astype(dtype), precision="highest")
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    return cross_entropy(logits, labels)
