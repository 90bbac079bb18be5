"""The GPU kernel that makes the states of linear attention, and from last to first the gradients of the states.

A block makes two tiles of features of one head, and walks all tokens with their part of the state in registers. What it
has of it before each group of tokens goes to HBM, where the kernels that are parallel in time read it: only these
states, in bfloat16, but no features and no increments (Yang et al., "Gated linear attention transformers with
hardware-efficient training", arXiv 2312.06635, algorithm 1 with `materialize`).

With x̂ and ŷ the products of entries without their scales s², S the state before a group and S' that after it,

    S' = keep S + Σ_s φ̂(k_s) v_sᵀ over the keys of the group,                sums' = keep sums + Σ_s φ̂(k_s),

and s² S goes out, so that φ(q)ᵀ S = φ̂(q)ᵀ (s² S). The gradient obeys the same equation with queries for keys, gradients
of the sums of values for values, from the last group to the first: one kernel serves for both.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, WARPGROUPS, along
from pallas_kernels.linear_attention.gpu_features import FEATURES
from pallas_kernels.linear_attention.gpu_tile import COLUMNS, FROM_PAST, TO_STATE, Spec


class Tokens(NamedTuple):
    """What becomes part of a state.

    Attributes:
        x: [B, T, H, Dx], whose features count.
        y: [B, T, H, E], what each feature is summed with.
        weights: float32 [B, H, T], what each is summed with in the sums; None: 1.
        rows: float32 [B, 4, T], `gpu_tile.token_rows`; None: all tokens are of one run.
        keeps: float32 [B, groups], likewise.
    """

    x: Any
    y: Any
    weights: Any
    rows: Any
    keeps: Any


class State(NamedTuple):
    """A state as the kernels have it: without scales, and padded.

    Attributes:
        kv: float32 [B, H, F, E].
        sums: float32 [B, H, F].
    """

    kv: jax.Array
    sums: jax.Array


def states(spec: Spec, tokens: Tokens, initial: State | None, *, reverse: bool):
    """Walks over all tokens.

    Args:
        spec: the specification.
        tokens: padded.
        initial: the state to begin with; None: zeros.
        reverse: from the last group to the first.

    Returns:
        the scaled states at the beginning of each group (with `reverse` at its end), bfloat16 [B, groups, H, F, E],
        their scaled sums, float32 [B, groups, H, F], and the `State` at the end of the walk.
    """
    batch, length, heads, width = tokens.x.shape
    features, values = spec.features.padded, tokens.y.shape[3]
    groups = length // spec.group
    inputs = {
        "x": tokens.x,
        "y": tokens.y,
        "selectors": spec.features.selectors,
        "scales": spec.features.squared_scales,
        "weights": tokens.weights,
        "rows": tokens.rows,
        "keeps": tokens.keeps,
        "initial": initial,
    }
    tile = ((COLUMNS,), jnp.float32)
    present = (tokens.weights is not None) + (tokens.rows is not None)
    degree = spec.features.selectors.shape[0]
    *emitted, kv, sums = hopper.call(
        functools.partial(_kernel, spec, jax.tree.structure(inputs), reverse),
        jax.tree.leaves(inputs),
        out=(
            ((batch, groups, heads, features, values), jnp.bfloat16),
            ((batch, groups, heads, features), jnp.float32),
            ((batch, heads, features, values), jnp.float32),
            ((batch, heads, features), jnp.float32),
        ),
        scratch=(
            plgpu.SMEM((WARPGROUPS, degree, width, FEATURES), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=degree, num_barriers=WARPGROUPS),
            plgpu.SMEM((WARPGROUPS, FEATURES, values), jnp.bfloat16),
            hopper.ring(
                ((COLUMNS, width), tokens.x.dtype),
                ((COLUMNS, values), tokens.y.dtype),
                *[tile] * present,
            ),
        ),
        grid={"batch": batch, "head": heads, "tile": features // (WARPGROUPS * FEATURES)},
        interpret=spec.interpret,
        name="linear_attention_gradients_of_states" if reverse else "linear_attention_states",
    )
    return *emitted, State(kv, sums)


def _kernel(spec: Spec, structure, reverse: bool, *references):
    """A block: two tiles of features [FEATURES] of a head, with all tokens of it."""
    count = structure.num_leaves
    refs = jax.tree.unflatten(structure, references[:count])
    out_kv, out_sums, last_kv, last_sums, *scratch = references[count:]
    matrices, matrices_filled, staged, ring = scratch
    batch, head, pair = (jax.lax.axis_index(name) for name in ("batch", "head", "tile"))
    num_tiles, group_tiles = refs["x"].shape[1] // COLUMNS, spec.group // COLUMNS

    def tile_at(i):
        return num_tiles - 1 - i if reverse else i

    warpgroup = jax.lax.axis_index("warpgroup")
    mask = FROM_PAST if reverse else TO_STATE

    def pieces(i):
        columns = pl.ds(tile_at(i) * COLUMNS, COLUMNS)
        yield refs["x"].at[batch, columns, head]
        yield refs["y"].at[batch, columns, head]
        if refs["weights"] is not None:
            yield refs["weights"].at[batch, head, columns]
        if refs["rows"] is not None:
            yield refs["rows"].at[batch, mask, columns]

    tiles = ring.start(num_tiles, pieces)

    rows = pl.ds((pair * WARPGROUPS + warpgroup) * FEATURES, FEATURES)
    selectors, filled = matrices.at[warpgroup], matrices_filled.at[warpgroup]
    for i in range(selectors.shape[0]):
        plgpu.copy_gmem_to_smem(refs["selectors"].at[i, :, rows], selectors.at[i], filled)
    scales = hopper.load_vector(refs["scales"].at[rows], 0)
    carry = _begin(refs["initial"], batch, head, rows, refs["y"].shape[3])
    plgpu.barrier_wait(filled)

    def emit(group, kv, sums):
        out_sums[batch, group, head, rows] = sums * scales
        scaled = kv * along(scales, kv.shape, 0)
        hopper.write_tile(scaled, staged.at[warpgroup], out_kv.at[batch, group, head, rows])

    def accumulate(i, pieces, carry):
        x, y, *vectors = pieces
        kv, sums = carry
        group = jax.lax.div(tile_at(i), group_tiles)

        @pl.when(jax.lax.rem(i, group_tiles) == 0)
        def _():
            emit(group, kv, sums)

        entries = hopper.products(*((selectors.at[j].T, x.T) for j in range(selectors.shape[0])))
        products = functools.reduce(jnp.multiply, entries)
        if refs["rows"] is not None:
            products *= along(hopper.load_vector(vectors.pop(), 1), products.shape, 1)
            kept = jnp.where(jax.lax.rem(i, group_tiles) == 0, refs["keeps"][batch, group], 1)
            kv, sums = kv * kept, sums * kept
        weighted = products
        if vectors:
            weighted *= along(hopper.load_vector(vectors[0], 1), products.shape, 1)
        kv = hopper.add_product(kv, products, y, spec.interpret)
        return kv, sums + weighted.sum(axis=1)

    kv, sums = tiles.fold(accumulate, carry)
    last_sums[batch, head, rows] = sums
    last_kv[batch, head, rows] = kv


def _begin(initial: State | None, batch, head, rows, values: int):
    """The rows of the state that a warpgroup begins with, and of its sums, in registers."""
    kv, sums = hopper.zeros(ROWS, values), hopper.zeros(ROWS)
    if initial is not None:
        own = initial.kv.at[batch, head, rows]
        kv += plgpu.load(own, layout=plgpu.Layout.WGMMA, optimized=False)
        sums += hopper.load_vector(initial.sums.at[batch, head, rows], 0)
    return kv, sums
