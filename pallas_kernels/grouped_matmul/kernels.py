"""The custom VJP around two kernels, whatever the device: rows times matrices, and rows times rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels.varying import vary_alike


class Kernels(NamedTuple):
    """Those of a device.

    Attributes:
        rows_times_matrices: (lhs [M, K], rhs [G, K, N], group_sizes, transposed, interpret) -> [M, N]; with
            `transposed` rhs is [G, N, K].
        rows_times_rows: (lhs [M, K], rhs [M, N], group_sizes, interpret) -> [G, K, N].
    """

    rows_times_matrices: Callable[..., jax.Array]
    rows_times_rows: Callable[..., jax.Array]


def product(kernels: Kernels, interpret: Any, lhs, rhs, group_sizes):
    """[M, K] x [G, K, N] -> [M, N]; see the package for the arguments. `interpret`: as the kernels take it."""
    return _product(kernels, interpret, *vary_alike((lhs, rhs, group_sizes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(kernels, interpret, lhs, rhs, group_sizes):
    return kernels.rows_times_matrices(lhs, rhs, group_sizes, transposed=False, interpret=interpret)


def _forward(kernels, interpret, lhs, rhs, group_sizes):
    return _product(kernels, interpret, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(kernels, interpret, saved, d_out):
    lhs, rhs, group_sizes = saved
    d_lhs = kernels.rows_times_matrices(
        d_out, rhs, group_sizes, transposed=True, interpret=interpret
    )
    return d_lhs, kernels.rows_times_rows(lhs, d_out, group_sizes, interpret=interpret), None


_product.defvjp(_forward, _backward)
