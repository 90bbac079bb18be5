"""Grouped matrix product for TPU: `jax.lax.ragged_dot`, which XLA compiles to grouped kernels of its own there.

None of ours, as there is little to gain: each of its three kernels walks tiles of 128 rows, once for each group that
has rows in the tile, with 80 to 94 % of the matrix unit's slots in use. See the package for the figures.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike


def grouped_matmul(lhs, rhs, group_sizes):
    """[M, K] x [G, K, N] -> [M, N]; see the package for the arguments."""
    return _grouped_matmul(*vary_alike((lhs, rhs, group_sizes)))


@jax.custom_vjp
def _grouped_matmul(lhs, rhs, group_sizes):
    return _grouped_only(_ragged_dot(lhs, rhs, group_sizes), group_sizes)


def _forward(lhs, rhs, group_sizes):
    return _grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(saved, d_out):
    lhs, rhs, group_sizes = saved
    # A tile may hold rows of no group beside those of the last one: whatever they are, they are no part of d_rhs.
    lhs, d_out = (_grouped_only(x, group_sizes) for x in (lhs, d_out))
    _, pull = jax.vjp(lambda lhs, rhs: _ragged_dot(lhs, rhs, group_sizes), lhs, rhs)
    d_lhs, d_rhs = pull(d_out)
    return _grouped_only(d_lhs, group_sizes), d_rhs, None


_grouped_matmul.defvjp(_forward, _backward)


def _ragged_dot(lhs, rhs, group_sizes):
    # By default the matrix unit would round float32 to bfloat16.
    precision = "highest" if lhs.dtype == jnp.float32 else "default"
    return jax.lax.ragged_dot(lhs, rhs, group_sizes, precision=precision)


def _grouped_only(x, group_sizes):
    """x [M, ...] with 0 for the rows of no group, which the kernels need not visit and so leave as memory was."""
    row = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    return jnp.where(row < group_sizes.sum(), x, 0)
