"""Grouped matrix product for NVIDIA Hopper (Pallas, Mosaic GPU): the custom VJP around two kernels.

JAX ships such kernels (`jax.experimental.pallas.ops.gpu`: `ragged_dot_mgpu`, `transposed_ragged_dot_mgpu`). Not taken:
the second asks the device at hand for its number of cores, so that it compiles for no other; it multiplies the rows of
the neighbouring groups by 0, which NaN survives; and the same warpgroup copies and computes in both.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.gpu_matrices import rows_times_rows
from pallas_kernels.grouped_matmul.gpu_rows import rows_times_matrices
from pallas_kernels.varying import vary_alike


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
    interpret = hopper.interpreter(interpret)
    return _grouped_matmul(interpret, *vary_alike((lhs, rhs, group_sizes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(interpret, lhs, rhs, group_sizes):
    return rows_times_matrices(lhs, rhs, group_sizes, transposed=False, interpret=interpret)


def _forward(interpret, lhs, rhs, group_sizes):
    return _grouped_matmul(interpret, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(interpret, saved, d_out):
    lhs, rhs, group_sizes = saved
    d_lhs = rows_times_matrices(d_out, rhs, group_sizes, transposed=True, interpret=interpret)
    d_rhs = rows_times_rows(lhs, d_out, group_sizes, interpret=interpret)
    return d_lhs, d_rhs, None


_grouped_matmul.defvjp(_forward, _backward)
