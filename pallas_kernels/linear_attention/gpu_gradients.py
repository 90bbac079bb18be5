"""The GPU kernels of the gradients of linear attention, parallel in time: one for queries, one for keys and values.

With u_t and d_t the gradients of numerator and total, S the state before a group and Z the gradient of that after it
(both scaled, as `gpu_states` leaves them, with their sums), and φ̂ the products of entries of x̂:

    dw_ts = v_s · u_t + d_t for s <= t of a group,      d(q̂_t · k̂_s) = dw_ts w'(q̂_t · k̂_s)
    dφ̂(q_t) = S u_t + d_t sums(S),                      dφ̂(k_s) = Z v_s + sums(Z)
    dv_s = Σ_t w_ts u_t + Zᵀ φ̂(k_s)

Tiles are [queries, keys] for queries and [keys, queries] for keys and values: rows are what is summed for, so that all
sums stay in the registers of one warpgroup and a gradient is the same each time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, WARPGROUPS, along
from pallas_kernels.linear_attention import gpu_tile
from pallas_kernels.linear_attention.gpu_tile import (
    AS_KEY,
    AS_QUERY,
    COLUMNS,
    FROM_PAST,
    TO_STATE,
    Spec,
)


class Inputs(NamedTuple):
    """What both kernels read; arrays in time are padded.

    Attributes:
        q: x̂ of the queries, [B, T, H, Dx].
        k: x̂ of the keys, likewise.
        v: [B, T, H, E].
        u: gradient of the numerators, like v.
        d_total: gradient of the totals, float32 [B, H, T].
        state: bfloat16 [B, groups, H, F, E]: S for queries, Z for keys and values.
        sums: its sums, float32 [B, groups, H, F].
        selectors: A_i, [1 or 2, Dx, F].
        rows: `gpu_tile.token_rows`, or None.
    """

    q: Any
    k: Any
    v: Any
    u: Any
    d_total: Any
    state: Any
    sums: Any
    selectors: Any
    rows: Any


def query_gradient(spec: Spec, inputs: Inputs) -> jax.Array:
    """The gradient of q̂."""
    return _call(spec, _query_kernel, inputs, like=(inputs.q, inputs.u), out=(inputs.q,))[0]


def key_value_gradients(spec: Spec, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The gradients of k̂ and of v."""
    arrays = (inputs.k, inputs.v)
    return _call(spec, _key_value_kernel, inputs, like=arrays, out=arrays)


def _call(spec: Spec, kernel, inputs: Inputs, *, like, out):
    """Runs a kernel whose blocks keep their rows of two arrays `like`, and visit tiles of two such arrays."""
    values = inputs.v.shape[3]
    structure = jax.tree.structure(inputs)
    name = {_query_kernel: "queries", _key_value_kernel: "keys_and_values"}[kernel]
    vectors = [((COLUMNS,), jnp.float32)] * (
        (inputs.rows is not None) + (kernel is _key_value_kernel)
    )
    dtype = inputs.v.dtype
    tiles = [plgpu.SMEM((WARPGROUPS, ROWS, x.shape[3]), dtype) for x in like]

    def kernel_of_references(*references):
        count = structure.num_leaves
        kernel(spec, jax.tree.unflatten(structure, references[:count]), *references[count:])

    return hopper.call(
        kernel_of_references,
        jax.tree.leaves(inputs),
        out=[(x.shape, x.dtype) for x in out],
        scratch=(
            *tiles,
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            gpu_tile.state_ring(spec, values),
            hopper.ring(*(((COLUMNS, x.shape[3]), dtype) for x in like), *vectors),
        ),
        grid=gpu_tile.grid(inputs.q),
        interpret=spec.interpret,
        name=f"linear_attention_gradient_of_{name}",
    )


def _query_kernel(spec: Spec, inputs: Inputs, dq, q_tiles, u_tiles, filled, past_ring, ring):
    """A block: the queries [BLOCK, Dx] of a head, the keys of its group up to them -> dq̂ [BLOCK, Dx]."""
    q, k, v, u, d_total, state, sums, selectors, rows = inputs
    block = gpu_tile.Block.here(spec)
    warpgroup = jax.lax.axis_index("warpgroup")
    past_tiles = spec.tiles_of_past(block.group)
    past = gpu_tile.start_state(past_ring, spec, past_tiles, state, sums, selectors, block)
    tiles = gpu_tile.start_keys(ring, block, k, v, rows)

    own = block.rows(warpgroup)
    q_tile, u_tile = q_tiles.at[warpgroup], u_tiles.at[warpgroup]
    for x, tile in ((q, q_tile), (u, u_tile)):
        plgpu.copy_gmem_to_smem(x.at[block.batch, own, block.head], tile, filled.at[warpgroup])
    d_totals = hopper.load_vector(d_total.at[block.batch, block.head, own], 0)
    query_run = from_past = None
    if rows is not None:
        query_run, from_past = (
            gpu_tile.load_token_row(rows, which, block, warpgroup)
            for which in (AS_QUERY, FROM_PAST)
        )
    plgpu.barrier_wait(filled.at[warpgroup])

    def meet_past(_, pieces, total):
        state_tile, sums_tile, *matrices = pieces
        *entries, d_products = hopper.products(
            *((q_tile, matrix) for matrix in matrices), (u_tile, state_tile.T)
        )
        d_products += along(d_totals, d_products.shape, 0) * along(
            hopper.load_vector(sums_tile, 1), d_products.shape, 1
        )
        d_products = gpu_tile.rows_kept(d_products, from_past)
        return gpu_tile.add_pulled(spec, total, entries, d_products, matrices)

    def meet_keys(i, pieces, total):
        k_tile, v_tile, *key_run = pieces
        products, d_weights = hopper.products((q_tile, k_tile.T), (u_tile, v_tile.T))
        d_weights += along(d_totals, d_weights.shape, 0)
        d_products = gpu_tile.where_allowed(
            gpu_tile.weigh_gradient(spec, products, d_weights),
            own.start,
            (block.first + i) * COLUMNS,
            (query_run, hopper.load_vector(key_run[0], 1)) if key_run else None,
            queries_axis=0,
        )
        return hopper.add_product(total, d_products, k_tile, spec.interpret)

    total = past.fold(meet_past, hopper.zeros(ROWS, q.shape[3]))
    total = tiles.fold(meet_keys, total)
    hopper.write_tile(total, q_tile, dq.at[block.batch, own, block.head])


def _key_value_kernel(
    spec: Spec, inputs: Inputs, dk, dv, k_tiles, v_tiles, filled, state_ring, ring
):
    """A block: the keys [BLOCK, Dx] of a head, the queries of its group from them on -> dk̂ [BLOCK, Dx] and dv."""
    q, k, v, u, d_total, state, sums, selectors, rows = inputs
    block = gpu_tile.Block.here(spec)
    num_tiles = block.stop - block.own
    warpgroup = jax.lax.axis_index("warpgroup")

    def pieces(i):
        columns = pl.ds((block.own + i) * COLUMNS, COLUMNS)
        yield q.at[block.batch, columns, block.head]
        yield u.at[block.batch, columns, block.head]
        yield d_total.at[block.batch, block.head, columns]
        if rows is not None:
            yield rows.at[block.batch, AS_QUERY, columns]

    states = gpu_tile.start_state(
        state_ring, spec, spec.features.tiles, state, sums, selectors, block
    )
    tiles = ring.start(num_tiles, pieces)

    own = block.rows(warpgroup)
    k_tile, v_tile = k_tiles.at[warpgroup], v_tiles.at[warpgroup]
    for x, tile in ((k, k_tile), (v, v_tile)):
        plgpu.copy_gmem_to_smem(x.at[block.batch, own, block.head], tile, filled.at[warpgroup])
    key_run = to_state = None
    if rows is not None:
        key_run, to_state = (
            gpu_tile.load_token_row(rows, which, block, warpgroup) for which in (AS_KEY, TO_STATE)
        )
    plgpu.barrier_wait(filled.at[warpgroup])

    def meet_state(_, pieces, carry):
        k_total, v_total = carry
        state_tile, sums_tile, *matrices = pieces
        *entries, d_products = hopper.products(
            *((k_tile, matrix) for matrix in matrices), (v_tile, state_tile.T)
        )
        d_products += along(hopper.load_vector(sums_tile, 1), d_products.shape, 1)
        d_products = gpu_tile.rows_kept(d_products, to_state)
        features = gpu_tile.rows_kept(gpu_tile.features_of(k_tile, entries), to_state)
        v_total = hopper.add_product(v_total, features, state_tile, spec.interpret)
        return gpu_tile.add_pulled(spec, k_total, entries, d_products, matrices), v_total

    def meet_queries(i, pieces, carry):
        k_total, v_total = carry
        q_tile, u_tile, d_totals, *query_run = pieces
        products, d_weights = hopper.products((k_tile, q_tile.T), (v_tile, u_tile.T))
        d_weights += along(hopper.load_vector(d_totals, 1), d_weights.shape, 1)
        weights, d_products = (
            gpu_tile.where_allowed(
                x,
                (block.own + i) * COLUMNS,
                own.start,
                (hopper.load_vector(query_run[0], 1), key_run) if query_run else None,
                queries_axis=1,
            )
            for x in (
                gpu_tile.weigh(spec, products),
                gpu_tile.weigh_gradient(spec, products, d_weights),
            )
        )
        v_total, k_total = hopper.add_products(
            (v_total, k_total),
            (lambda: (weights, u_tile), lambda: (d_products, q_tile)),
            spec.interpret,
        )
        return k_total, v_total

    carry = hopper.zeros(ROWS, k.shape[3]), hopper.zeros(ROWS, v.shape[3])
    carry = states.fold(meet_state, carry)
    k_total, v_total = tiles.fold(meet_queries, carry)
    hopper.write_tile(k_total, k_tile, dk.at[block.batch, own, block.head])
    hopper.write_tile(v_total, v_tile, dv.at[block.batch, own, block.head])
