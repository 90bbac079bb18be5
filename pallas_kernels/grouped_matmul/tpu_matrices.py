"""The product of a group's rows with its rows on TPU (Pallas, Mosaic): [M, K] x [M, N] -> [G, K, N].

The sums of a group stay in VMEM until its last tile. A tile that groups share is multiplied once for each, with 0 for
the rows of the others, on both sides: 0 times what may be there need not be 0.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import round_up
from pallas_kernels.grouped_matmul.tpu_visits import (
    SUBLANES,
    Visits,
    compiler_params,
    inside,
    unit_rows,
    visits,
)
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.tpu_dot import dot
from pallas_kernels.varying import interpreter, shaped_like


def rows_times_rows(lhs, rhs, group_sizes, *, interpret):
    """`lhs[m].T @ rhs[m]` over the rows m of each group; 0 for a group without rows."""
    num_rows, num_groups = lhs.shape[0], group_sizes.shape[0]
    tile_rows = min(unit_rows(), round_up(num_rows, SUBLANES))
    more = ((0, -num_rows % tile_rows), (0, 0))
    lhs, rhs = jnp.pad(lhs, more), jnp.pad(rhs, more)
    walk = visits(group_sizes, lhs.shape[0], tile_rows, every_group=True)
    blocks = [min(x.shape[1], most) for x, most in ((lhs, 1024), (rhs, 2048))]
    return tpu_call(
        functools.partial(_kernel, tile_rows, num_groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk),
            grid=(
                pl.cdiv(lhs.shape[1], blocks[0]),
                pl.cdiv(rhs.shape[1], blocks[1]),
                walk.tile.shape[0],
            ),
            in_specs=[
                pl.BlockSpec((tile_rows, blocks[0]), lambda k, n, v, g, tile, *_: (tile[v], k)),
                pl.BlockSpec((tile_rows, blocks[1]), lambda k, n, v, g, tile, *_: (tile[v], n)),
            ],
            out_specs=pl.BlockSpec(
                (None, *blocks),
                lambda k, n, v, group, *_: (jnp.minimum(group[v], num_groups - 1), k, n),
            ),
            scratch_shapes=[pltpu.VMEM(blocks, jnp.float32)],
        ),
        out_shape=shaped_like(lhs, (num_groups, lhs.shape[1], rhs.shape[1])),
        compiler_params=compiler_params(),
        interpret=interpreter(interpret, lhs),
        name="rows_times_rows",
    )(*walk, lhs, rhs)


def _kernel(tile_rows: int, num_groups: int, *refs):
    """One visit: refs of `Visits`, of a tile of lhs and rhs, of a block of out, and of its sums."""
    walk, (lhs, rhs, out, sums) = Visits(*refs[:3]), refs[3:]
    visit = pl.program_id(2)
    begin, end = walk.rows(visit, tile_rows)
    is_whole = (begin <= 0) & (end >= tile_rows)
    group = walk.group[visit]
    is_visit = group < num_groups
    is_first = (visit == 0) | (group != walk.group[jnp.maximum(visit - 1, 0)])
    # The last group's last visit has none after it, or one of the group behind all others.
    is_last = group != walk.group[jnp.minimum(visit + 1, pl.num_programs(2) - 1)]
    is_last |= visit == pl.num_programs(2) - 1

    def product(own):
        x, y = (ref[...] if own is None else jnp.where(own(ref), ref[...], 0) for ref in (lhs, rhs))
        return dot(x, y, ((0,), (0,)))

    def add(own):
        @pl.when(is_first)
        def _():
            sums[...] = product(own)

        @pl.when(~is_first)
        def _():
            sums[...] += product(own)

    @pl.when(is_visit & is_whole)
    def _():
        add(None)

    @pl.when(is_visit & ~is_whole)
    def _():
        add(lambda ref: inside(begin, end, ref.shape))

    @pl.when(is_visit & is_last)
    def _():
        out[...] = sums[...].astype(out.dtype)
