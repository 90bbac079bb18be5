"""Grouped matrix product in pure JAX: a loop over the groups, and in each over as many row tiles as it has rows for.

`jax.lax.ragged_dot` multiplies every row by every group's matrix where the backend has no kernel for it (XLA:CPU:
time and memory grow with G). Here the loop's length is the number of tiles in use, so that rows past the sum of the
group sizes, and groups without rows, take no time. Tiles start where their group starts; rows that a tile reads past
the end of its group are computed and dropped. A few rows at the end of a group, all it has while decoding, are
multiplied one by one.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.varying import vary_alike

# Rows of a tile: wide enough for a fast matrix product, narrow beside a typical group, which is small if rows are few.
TILE, SMALL_TILE = 64, 16
# So many rows take XLA:CPU as long one by one, by its matrix-vector product, as a small tile takes.
FEW_ROWS = 8


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
    num_rows, num_groups = rows.shape[0], matrices.shape[0]
    tile_rows = TILE if num_rows >= TILE * num_groups else SMALL_TILE
    starts = jnp.cumsum(group_sizes) - group_sizes
    with_rows = jnp.argsort(group_sizes == 0)  # first the groups that have rows

    def group(n, out):
        start, size = starts[with_rows[n]], group_sizes[with_rows[n]]
        matrix = matrices[with_rows[n]]

        def tile(i, out):
            first, inside = _tile(start + i * tile_rows, start + size, num_rows, tile_rows)
            product = _dot(equation, _slice(rows, first, tile_rows), matrix).astype(rows.dtype)
            product = jnp.where(inside[:, None], product, _slice(out, first, tile_rows))
            return jax.lax.dynamic_update_slice_in_dim(out, product, first, axis=0)

        def row(i, out):
            product = _dot(equation, _slice(rows, start + i, 1), matrix).astype(rows.dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, product, start + i, axis=0)

        done = 0
        if num_rows >= 2 * tile_rows:
            num_tiles = -((FEW_ROWS - size) // tile_rows)
            out = jax.lax.fori_loop(0, num_tiles, tile, out)
            done = num_tiles * tile_rows
        return jax.lax.fori_loop(done, size, row, out)

    out = jnp.zeros_like(rows, shape=shape)
    return jax.lax.fori_loop(0, jnp.count_nonzero(group_sizes), group, out)


def _rows_times_rows(lhs, rhs, group_sizes):
    """For each group, the product lhsᵀ rhs over its rows: [M, K] x [M, N] -> [G, K, N]."""

    tile_rows = min(TILE, lhs.shape[0])

    def group(_, group):
        start, size = group

        def tile(i, total):
            first, inside = _tile(start + i * tile_rows, start + size, lhs.shape[0], tile_rows)
            lhs_tile = jnp.where(inside[:, None], _slice(lhs, first, tile_rows), 0)
            return total + _dot("mk,mn->kn", lhs_tile, _slice(rhs, first, tile_rows))

        total = jnp.zeros_like(lhs, _accumulator(lhs.dtype), shape=(lhs.shape[1], rhs.shape[1]))
        return None, jax.lax.fori_loop(0, -(-size // tile_rows), tile, total)

    starts = jnp.cumsum(group_sizes) - group_sizes
    return jax.lax.scan(group, None, (starts, group_sizes))[1]


def _tile(own, end, num_rows: int, tile_rows: int):
    """First row of the tile at `own` of the group that ends at `end`, and which of its rows [tile_rows] are its own.

    A tile that would pass the last row is moved up; the rows above are not its own.
    """
    first = jnp.minimum(own, num_rows - tile_rows)
    row = first + jnp.arange(tile_rows)
    return first, (row >= own) & (row < end)


def _slice(x, first, size: int):
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=0)


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=_accumulator(x.dtype))


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)
