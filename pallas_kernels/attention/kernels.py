"""The custom VJP around a forward and a backward of attention, whatever the device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels.residuals import keep
from pallas_kernels.varying import vary_alike


class Kernels(NamedTuple):
    """Those of a device.

    Attributes:
        forward: (spec, q, k, v, queries, keys) -> (out, lse).
        backward: (spec, (q, k, v, queries, keys, out, lse), (d_out, d_lse)) -> (dq, dk, dv).
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def differentiable(kernels: Kernels, spec: Any, *arrays):
    """`(out, lse)` of (q, k, v, queries, keys, known); it is `known` if that is not None.

    Args:
        kernels: those that are run.
        spec: their static arguments.
        *arrays: in their layout; see the package.
    """
    return _attention(kernels, spec, *vary_alike(arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(kernels, spec, *arrays):
    return _forward(kernels, spec, *arrays)[0]


def _forward(kernels, spec, *arrays):
    *arrays, known = arrays
    if known is None:
        known = keep(*kernels.forward(spec, *arrays))
    return known, (*arrays, *known)


def _backward(kernels, spec, saved, cotangents):
    return *kernels.backward(spec, saved, cotangents), None, None, None


_attention.defvjp(_forward, _backward)
