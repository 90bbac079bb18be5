"""Grouped matrix products beside `jax.lax.ragged_dot`, and on TPU beside megablox."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

from benchmarks.kernels.case import BOTH, FORWARD, Case, Contender, implementations
from benchmarks.kernels.roofline import Product, Work
from pallas_kernels import OPS, grouped_matmul
from pallas_kernels.bundles import Kernel

_GROUPS = 8
# Megablox's tiles: rows, and the longest of the other two axes. The backward swaps these, so that they are alike.
_MEGABLOX_ROWS, _MEGABLOX_COLUMNS = 128, 1024


def grouped_matmul_cases(quick: bool) -> list[Case]:
    """An expert layer of a small and of a medium model, eight experts."""
    shapes = [(1024, 256, 512), (4096, 1024, 4096)]
    return [_case(*shape) for shape in shapes[: 1 if quick else None]]


def _case(rows: int, width: int, columns: int) -> Case:
    # Unequal groups that end inside of tiles, as a router makes them.
    shares = np.cumsum(np.arange(1, _GROUPS + 1))
    ends = (rows * shares // shares[-1]).tolist()

    def make_inputs(key, dtype):
        keys = jax.random.split(key, 2)
        return {
            "lhs": jax.random.normal(keys[0], (rows, width), dtype),
            "rhs": jax.random.normal(keys[1], (_GROUPS, width, columns), dtype),
            "group_sizes": jnp.asarray(np.diff(ends, prepend=0), jnp.int32),
        }

    forward = Work((Product(rows, width, columns),))
    both = forward + Work((Product(rows, columns, width), Product(width, rows, columns)))
    steps = functools.partial(_steps, ends)
    tile = min(_MEGABLOX_COLUMNS, width, columns)
    gmm = functools.partial(_megablox, tiles=(_MEGABLOX_ROWS, tile, tile))
    return Case(
        op="grouped_matmul",
        shape=f"[{rows}, {width}] x [{_GROUPS}, {width}, {columns}]",
        make_inputs=make_inputs,
        contenders=(
            *implementations(grouped_matmul, OPS["grouped_matmul"], steps=steps),
            Contender("jax.lax.ragged_dot", jax.lax.ragged_dot, has_schedule=True, steps=steps),
            Contender("megablox", gmm, platforms=("tpu",), has_schedule=True, steps=steps),
        ),
        work={FORWARD: (forward,), BOTH: (both,)},
    )


def _steps(ends: list[int], kernel: Kernel) -> int | None:
    """Grid steps of a grouped kernel: visits of row tiles, times the blocks of the groups' matrices."""
    rows = [w.block[0] for w in kernel.windows if len(w.whole) == 2 and w.whole[0] == ends[-1]]
    matrices = [w.num_blocks[1:] for w in kernel.windows if len(w.whole) == 3]
    if not rows or not matrices:
        return None
    return visited_tiles(ends, rows[0]) * math.prod(matrices[0])


def visited_tiles(ends: list[int], tile: int) -> int:
    """Pairs of a group and a tile of rows that holds some of its rows; group g ends before row `ends[g]`."""
    starts = [0, *ends[:-1]]
    return sum(
        (end - 1) // tile - start // tile + 1
        for start, end in zip(starts, ends, strict=True)
        if start < end
    )


def _megablox(lhs, rhs, group_sizes, *, tiles):
    return megablox.gmm(lhs, rhs, group_sizes, lhs.dtype, tiles)
