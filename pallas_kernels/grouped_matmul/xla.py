"""Grouped matrix product in pure JAX: a loop over the groups, and in each over as many row tiles as it has rows for.

`jax.lax.ragged_dot` multiplies every row by every group's matrix where the backend has no kernel for it (XLA:CPU:
time and memory grow with G). Here the loop's length is the number of tiles in use, so that rows past the sum of the
group sizes, and groups without rows, take no time. Tiles start where their group starts; rows that a tile reads past
the end of its group are computed and dropped, on average half a tile a group.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike

# Rows of a tile: wide enough for a fast matrix product, narrow beside a typical group.
TILE = 64


def grouped_matmul(lhs, rhs, group_sizes):
    """[M, K] x [G, K, N] -> [M, N]; see the package for the arguments."""
    return _grouped_matmul(*vary_alike((lhs, rhs, group_sizes)))


@jax.custom_vjp
def _grouped_matmul(lhs, rhs, group_sizes):
    return _rows_times_matrices("mk,kn->mn", lhs, rhs, group_sizes)


def _forward(lhs, rhs, group_sizes):
    return _grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(saved, d_out):
    lhs, rhs, group_sizes = saved
    d_lhs = _rows_times_matrices("mn,kn->mk", d_out, rhs, group_sizes)
    d_rhs = _rows_times_rows(lhs, d_out, group_sizes)
    return d_lhs, d_rhs.astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _rows_times_matrices(equation, rows, matrices, group_sizes):
    """Each row times its group's matrix, in the rows' dtype."""
    shape = jax.eval_shape(lambda x, y: jnp.einsum(equation, x, y), rows, matrices[0]).shape

    def group(out, group):
        matrix, start, size = group

        def tile(i, out):
            first, inside = _tile(i, start, size, rows.shape[0])
            product = _dot(equation, _slice(rows, first), matrix).astype(rows.dtype)
            product = jnp.where(inside[:, None], product, _slice(out, first))
            return jax.lax.dynamic_update_slice_in_dim(out, product, first, axis=0)

        return jax.lax.fori_loop(0, -(-size // TILE), tile, out), None

    starts = jnp.cumsum(group_sizes) - group_sizes
    out, _ = jax.lax.scan(group, jnp.zeros_like(rows, shape=shape), (matrices, starts, group_sizes))
    return out


def _rows_times_rows(lhs, rhs, group_sizes):
    """For each group, the product lhsᵀ rhs over its rows: [M, K] x [M, N] -> [G, K, N]."""

    def group(_, group):
        start, size = group

        def tile(i, total):
            first, inside = _tile(i, start, size, lhs.shape[0])
            lhs_tile = jnp.where(inside[:, None], _slice(lhs, first), 0)
            return total + _dot("mk,mn->kn", lhs_tile, _slice(rhs, first))

        total = jnp.zeros_like(lhs, _accumulator(lhs.dtype), shape=(lhs.shape[1], rhs.shape[1]))
        return None, jax.lax.fori_loop(0, -(-size // TILE), tile, total)

    starts = jnp.cumsum(group_sizes) - group_sizes
    return jax.lax.scan(group, None, (starts, group_sizes))[1]


def _tile(i, start, size, num_rows: int):
    """First row of tile i of a group, and which of its rows [TILE] are the tile's own.

    A tile that would pass the last row is moved up; the rows above are not its own.
    """
    own = start + i * TILE
    first = jnp.minimum(own, max(num_rows - TILE, 0))
    row = first + jnp.arange(min(TILE, num_rows))
    return first, (row >= own) & (row < start + size)


def _slice(x, first):
    return jax.lax.dynamic_slice_in_dim(x, first, min(TILE, x.shape[0]), axis=0)


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=_accumulator(x.dtype))


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)
