"""Grouped matrix product for TPU (Pallas, Mosaic): the custom VJP around two kernels.

`jax.lax.ragged_dot` and megablox (`jax.experimental.pallas.ops.tpu.megablox`) are not taken; the package says why.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.tpu_matrices import rows_times_rows
from pallas_kernels.grouped_matmul.tpu_rows import rows_times_matrices
from pallas_kernels.varying import vary_alike


def refuses(lhs, rhs, group_sizes) -> str | None:
    """What the kernels cannot do with these arguments, or None."""
    if lhs.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {lhs.dtype}; they take bfloat16 and float32"
    return None


def grouped_matmul(lhs, rhs, group_sizes, *, interpret=False):
    """[M, K] x [G, K, N] -> [M, N]; see the package for the arguments. `interpret`: as `pallas_call` has it."""
    return _grouped_matmul(interpret, *vary_alike((lhs, rhs, group_sizes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(interpret, lhs, rhs, group_sizes):
    return rows_times_matrices(lhs, rhs, group_sizes, transposed=False, interpret=interpret)


def _forward(interpret, lhs, rhs, group_sizes):
    return _grouped_matmul(interpret, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(interpret, saved, d_out):
    lhs, rhs, group_sizes = saved
    d_lhs = rows_times_matrices(d_out, rhs, group_sizes, transposed=True, interpret=interpret)
    return d_lhs, rows_times_rows(lhs, d_out, group_sizes, interpret=interpret), None


_grouped_matmul.defvjp(_forward, _backward)
