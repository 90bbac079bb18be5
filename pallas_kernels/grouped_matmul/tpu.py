"""Grouped matrix product for TPU (Pallas, Mosaic): two kernels.

`jax.lax.ragged_dot` and megablox (`jax.experimental.pallas.ops.tpu.megablox`) are not taken; the package says why.
"""

import jax.numpy as jnp

from pallas_kernels.grouped_matmul.kernels import Kernels, product
from pallas_kernels.grouped_matmul.tpu_matrices import rows_times_rows
from pallas_kernels.grouped_matmul.tpu_rows import rows_times_matrices

_KERNELS = Kernels(rows_times_matrices, rows_times_rows)


def refuses(lhs, rhs, group_sizes) -> str | None:
    """What the kernels cannot do with these arguments, or None."""
    if lhs.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {lhs.dtype}; they take bfloat16 and float32"
    return None


def grouped_matmul(lhs, rhs, group_sizes, *, interpret=False):
    """[M, K] x [G, K, N] -> [M, N]; see the package for the arguments. `interpret`: as `pallas_call` has it."""
    return product(_KERNELS, interpret, lhs, rhs, group_sizes)
