"""Rows times the matrix of their group on TPU (Pallas, Mosaic): [M, K] x [G, K, N] -> [M, N], and with turned matrices.

A matrix stays in VMEM as long as tiles of its group come. In a tile that groups share each writes its own rows; the
rows of no group are a group of their own, which writes 0.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import round_up
from pallas_kernels.grouped_matmul.tpu_visits import (
    Sizes,
    Visits,
    compiler_params,
    inside,
    sizes,
    visits,
)
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.tpu_dot import dot
from pallas_kernels.varying import interpreter, shaped_like


def rows_times_matrices(lhs, rhs, group_sizes, *, transposed: bool, interpret):
    """`lhs[m] @ rhs[g]`, or `lhs[m] @ rhs[g].T` with `transposed`, where g is the group of row m; else 0."""
    num_rows, depth = lhs.shape
    num_groups, columns = rhs.shape[0], rhs.shape[1 if transposed else 2]
    block = sizes(num_rows, depth, columns, lhs.dtype.itemsize)
    whole_rows, whole_depth = round_up(num_rows, block.rows), round_up(depth, block.depth)
    lhs = jnp.pad(lhs, ((0, whole_rows - num_rows), (0, whole_depth - depth)))
    more = (0, whole_depth - depth)
    rhs = jnp.pad(rhs, ((0, 0), (0, 0), more) if transposed else ((0, 0), more, (0, 0)))
    walk = visits(group_sizes, whole_rows, block.rows, every_group=False)
    parts = whole_depth // block.depth

    def matrix(n, v, k, group, *_):
        group = jnp.minimum(group[v], num_groups - 1)
        return (group, n, k) if transposed else (group, k, n)

    shape = (block.columns, block.depth) if transposed else (block.depth, block.columns)
    sums = pltpu.VMEM((block.rows, block.columns), jnp.float32)
    out = tpu_call(
        functools.partial(_kernel, block, num_groups, parts, transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk),
            grid=(pl.cdiv(columns, block.columns), walk.tile.shape[0], parts),
            in_specs=[
                pl.BlockSpec((block.rows, block.depth), lambda n, v, k, g, tile, *_: (tile[v], k)),
                pl.BlockSpec((None, *shape), matrix),
            ],
            out_specs=pl.BlockSpec(
                (block.rows, block.columns), lambda n, v, k, g, tile, *_: (tile[v], n)
            ),
            scratch_shapes=[sums] if parts > 1 else [],
        ),
        out_shape=shaped_like(lhs, (whole_rows, columns)),
        compiler_params=compiler_params(),
        interpret=interpreter(interpret, lhs),
        name="rows_times_matrices",
    )(*walk, lhs, rhs)
    return out[:num_rows]


def _kernel(block: Sizes, num_groups: int, parts: int, transposed: bool, *refs):
    """One part of the sums of a tile: refs of `Visits`, of a block of lhs, rhs and out, and of the sums before."""
    walk, (lhs, rhs, out, *sums) = Visits(*refs[:3]), refs[3:]
    visit, part = pl.program_id(1), pl.program_id(2)
    group = walk.group[visit]
    begin, end = walk.rows(visit, block.rows)

    def product():
        return dot(lhs[...], rhs[...], ((1,), (1 if transposed else 0,)))

    def total():
        return product() + sums[0][...] if sums else product()

    def put(rows):
        # In whole tiles too: to branch around the mask takes as long as the mask.
        own = inside(begin, end, out.shape)
        out[...] = jnp.where(own, rows.astype(out.dtype), out[...])

    is_last = part == parts - 1
    has_products = group < num_groups
    if sums:

        @pl.when(has_products & (part == 0))
        def _():
            sums[0][...] = product()

        @pl.when(has_products & (part > 0) & ~is_last)
        def _():
            sums[0][...] += product()

    @pl.when(has_products & is_last)
    def _():
        put(total())

    @pl.when(group == num_groups)
    def _():
        put(jnp.zeros(out.shape, jnp.float32))
