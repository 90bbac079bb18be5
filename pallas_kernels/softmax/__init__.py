"""Softmax and cross-entropy: signatures, validation and dispatch.

What serves which op, the preferred first:

| op | TPU | elsewhere | memory beside inputs, outputs and their gradients |
| --- | --- | --- | --- |
| softmax | "tpu" | "xla"; on Hopper "gpu" by name | the output, kept for the backward |
| cross_entropy | "tpu" | "xla"; on Hopper "gpu" by name | a mantissa and an exponent a token |
| linear_cross_entropy | "xla": its matrix products dominate | "xla" | the logits of a chunk |
"""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_positive_int, check_soft_cap
from pallas_kernels.dispatch import Implementation, call, kernels_or_xla
from pallas_kernels.softmax import reference, xla, xla_linear

__all__ = ["cross_entropy", "linear_cross_entropy", "softmax"]

SOFTMAX_IMPLEMENTATIONS = kernels_or_xla(
    f"{__name__}.tpu", xla, reference, "softmax", f"{__name__}.gpu"
)
CROSS_ENTROPY_IMPLEMENTATIONS = kernels_or_xla(
    f"{__name__}.tpu", xla, reference, "cross_entropy", f"{__name__}.gpu"
)
LINEAR_CROSS_ENTROPY_IMPLEMENTATIONS = {
    "xla": Implementation(xla_linear.linear_cross_entropy),
    "reference": Implementation(reference.linear_cross_entropy),
}


def softmax(x: jax.Array, *, axis: int = -1, implementation: str | None = None) -> jax.Array:
    """e^x / Σ e^x in two passes over memory: one that sums, without looking for the largest first, one that writes.

    Equal to `jax.nn.softmax`, to which x may also hold -inf (0), +inf and NaN (NaN all along). Dukhan and
    Ablavatski, "The Two-Pass Softmax Algorithm", arXiv 2001.04438, algorithm 3; `extended` says what is different
    here. On TPU x is even read only once where a few rows of it fit into VMEM.

    Args:
        x: float, of one axis or more.
        axis: the axis that sums to 1.
        implementation: "tpu", "gpu" (Hopper), "xla", "reference", or "tpu_interpret" and "gpu_interpret", the kernels
            run anywhere by Pallas' interpreters; None takes the best for this platform, and "gpu" only by name.

    Returns:
        x's shape and dtype, computed in at least float32.

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    _check_float("softmax", "x", x)
    ndim = jnp.ndim(x)
    if isinstance(axis, bool) or not isinstance(axis, int) or not -ndim <= axis < ndim:
        raise ValueError(f"softmax: axis must be an int from {-ndim} to {ndim - 1}, not {axis!r}")
    x = jnp.moveaxis(x, axis, -1)
    y = call("softmax", SOFTMAX_IMPLEMENTATIONS, implementation, x)
    return jnp.moveaxis(y, -1, axis)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of each label, and the log-sum-exp of its logits.

    One pass over the logits forward, one backward, which computes the probabilities again: they are never in memory.
    Differentiable in the logits, through both results: a z-loss is a function of lse.

    Args:
        logits: float [..., V].
        labels: int [...], from 0 to V - 1. The values are not checked: any other is a label without a logit, of
            loss lse.
        implementation: "tpu", "gpu" (Hopper), "xla", "reference", or "tpu_interpret" and "gpu_interpret", the kernels
            run anywhere by Pallas' interpreters; None takes the best for this platform, and "gpu" only by name.

    Returns:
        `(loss [...], lse [...])`, float32 (float64 for float64). The loss is as precise where lse itself is large.

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    _check_float("cross_entropy", "logits", logits)
    labels = _check_labels("cross_entropy", labels, "logits", logits)
    return call("cross_entropy", CROSS_ENTROPY_IMPLEMENTATIONS, implementation, logits, labels)


def linear_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    logits_soft_cap: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy(hidden @ weight, labels)` of which only one chunk of the vocabulary is in memory at a time.

    The backward makes the logits again, a third product beside the two of the gradients. Wijmans et al., "Cut Your
    Losses in Large-Vocabulary Language Models", arXiv 2411.09009, section 4.

    Args:
        hidden: float [..., D].
        weight: float [D, V], of hidden's dtype.
        labels: int [...], as in `cross_entropy`.
        logits_soft_cap: logits become cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2).
        chunk_size: logits a chunk; None: chosen by the implementation.
        implementation: "xla" or "reference"; None takes the best for this platform.

    Returns:
        `(loss [...], lse [...])`, float32 (float64 for float64).

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    op = "linear_cross_entropy"
    _check_float(op, "hidden", hidden)
    _check_float(op, "weight", weight)
    if jnp.ndim(weight) != 2 or weight.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight must be [D={hidden.shape[-1]}, V], not of shape {jnp.shape(weight)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"{op}: weight has dtype {weight.dtype} but hidden has {hidden.dtype}; cast one"
        )
    check_soft_cap(op, logits_soft_cap)
    check_positive_int(op, "chunk_size", chunk_size)
    labels = _check_labels(op, labels, "hidden", hidden)
    return call(
        op,
        LINEAR_CROSS_ENTROPY_IMPLEMENTATIONS,
        implementation,
        hidden,
        weight,
        labels,
        logits_soft_cap=logits_soft_cap,
        chunk_size=chunk_size,
    )


def _check_float(op: str, name: str, x) -> None:
    if jnp.ndim(x) < 1:
        raise ValueError(f"{op}: {name} must have an axis, but is a scalar")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op}: {name} must be floating point, not {x.dtype}")
    if 0 in x.shape:
        raise ValueError(f"{op}: {name} has an axis of size 0: {x.shape}")


def _check_labels(op: str, labels, name: str, x) -> jax.Array:
    if jnp.shape(labels) != x.shape[:-1]:
        raise ValueError(
            f"{op}: labels must be of shape {x.shape[:-1]}, as {name} {x.shape} without its last axis, "
            f"not {jnp.shape(labels)}"
        )
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(f"{op}: labels must be integer, not {jnp.result_type(labels)}")
    return jnp.asarray(labels, jnp.int32)
