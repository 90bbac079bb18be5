"""Grouped matrix product for NVIDIA Hopper (Pallas, Mosaic GPU): two kernels.

JAX ships such kernels (`jax.experimental.pallas.ops.gpu`: `ragged_dot_mgpu`, `transposed_ragged_dot_mgpu`). Not taken:
the second asks the device at hand for its number of cores, so that it compiles for no other, and it multiplies the rows
of the neighbouring groups by 0, which NaN survives.
"""

import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.gpu_matrices import rows_times_rows
from pallas_kernels.grouped_matmul.gpu_rows import rows_times_matrices
from pallas_kernels.grouped_matmul.kernels import Kernels, product

_KERNELS = Kernels(rows_times_matrices, rows_times_rows)


def refuses(lhs, rhs, group_sizes) -> str | None:
    """What the kernels cannot do with these arguments or on this GPU, or None."""
    if lhs.dtype != jnp.bfloat16:
        return f"dtype {lhs.dtype}; it takes bfloat16"
    return hopper.refuses_device()


def grouped_matmul(lhs, rhs, group_sizes, *, interpret=False):
    """[M, K] x [G, K, N] -> [M, N]; see the package for the arguments.

    `interpret`: True or a `plgpu.InterpretGPUParams` to run without a GPU. The interpreter has side effects, with which
    JAX refuses `jax.checkpoint` and `jax.shard_map`; the compiled kernels have none.
    """
    return product(_KERNELS, hopper.interpreter(interpret), lhs, rhs, group_sizes)
