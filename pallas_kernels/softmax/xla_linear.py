"""Cross-entropy of a linear layer in pure JAX: logits of one chunk of the vocabulary at a time, forward and backward.

The forward adds up Σ e^logit as numbers with an exponent apart and picks the logits of the labels; the backward
computes each chunk's logits again, their gradient from mantissa and exponent, and its two products.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import extended, xla
from pallas_kernels.softmax.extended import accumulator
from pallas_kernels.varying import vary_alike

CHUNK = 2048


def linear_cross_entropy(hidden, weight, labels, *, logits_soft_cap, chunk_size):
    """Returns `(loss [...], lse [...])`; see the package for the arguments."""
    hidden, weight, labels = vary_alike((hidden, weight, labels))
    chunk = min(chunk_size or CHUNK, weight.shape[1])
    rows = hidden.reshape(-1, hidden.shape[-1])
    outputs = _linear_cross_entropy((chunk, logits_soft_cap), rows, weight, labels.reshape(-1))
    return tuple(x.reshape(labels.shape) for x in outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_cross_entropy(spec, hidden, weight, labels):
    """Of hidden [N, D], weight [D, V] and labels [N]; `spec`: words a chunk, and the soft cap."""
    return _forward(spec, hidden, weight, labels)[0]


def _forward(spec, hidden, weight, labels):
    chunk, soft_cap = spec

    def step(carry, start, columns):
        total, label_logits = carry
        logits = xla.capped(_dot("nd,dv->nv", hidden, columns), soft_cap)
        total = extended.add(total, extended.sum_of_exponentials(logits))
        return total, label_logits + xla.logits_of(labels - start, logits)

    nothing = extended.zero(hidden[:, 0])
    total, label_logits = _over_chunks(chunk, weight, step, (nothing, nothing.mantissa))
    outputs = xla.loss_and_lse(total, label_logits)
    return outputs, (hidden, weight, labels, total)


def _backward(spec, saved, cotangents):
    chunk, soft_cap = spec
    hidden, weight, labels, total = saved

    def step(carry, start, columns):
        d_hidden, d_weight = carry
        logits = xla.capped(_dot("nd,dv->nv", hidden, columns), soft_cap)
        d_logits = xla.logits_gradient(logits, labels - start, total, *cotangents)
        if soft_cap is not None:
            d_logits *= 1 - jnp.square(logits / soft_cap)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += _dot("nv,dv->nd", d_logits, columns)
        # Of the weight's dtype, and so is what devices sum of it, where they share the rows.
        d_columns = jnp.einsum("nd,nv->dv", hidden, d_logits, preferred_element_type=weight.dtype)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_weight, d_columns, start, axis=1)

    nothing = jnp.zeros_like(hidden, accumulator(hidden.dtype)), jnp.zeros_like(weight)
    d_hidden, d_weight = _over_chunks(chunk, weight, step, nothing)
    return d_hidden.astype(hidden.dtype), d_weight, None


_linear_cross_entropy.defvjp(_forward, _backward)


def _over_chunks(chunk, weight, step, carry):
    """Folds `step(carry, start, columns [D, C])` over the chunks of the vocabulary; the last may be shorter."""
    whole, rest = divmod(weight.shape[1], chunk)

    def add_chunk(i, carry, length=chunk):
        columns = jax.lax.dynamic_slice_in_dim(weight, i * chunk, length, axis=1)
        return step(carry, i * chunk, columns)

    carry = jax.lax.fori_loop(0, whole, add_chunk, carry)
    return add_chunk(whole, carry, rest) if rest else carry


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=accumulator(x.dtype))
