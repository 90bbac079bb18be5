"""The GPU kernel of linear attention's output, parallel in time: each block reads the state before its group of tokens.

    numerator_t = Σ_s w_ts v_s + φ(q_t)ᵀ S,      total_t = Σ_s w_ts + φ(q_t) · sums,      s <= t of the same group

with w_ts from the product of query and key alone, so that features are expanded where a query meets the state only.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, WARPGROUPS, along
from pallas_kernels.linear_attention import gpu_tile
from pallas_kernels.linear_attention.gpu_tile import AS_QUERY, COLUMNS, FROM_PAST, Spec


def outputs(spec: Spec, q, k, v, rows, state, sums):
    """Returns out, like v, and the totals, eps included, float32 [B, H, T].

    Args:
        spec: the specification.
        q: x̂ of the queries, [B, T, H, Dx] padded.
        k: x̂ of the keys, likewise.
        v: [B, T, H, E] padded.
        rows: `gpu_tile.token_rows`, or None.
        state: bfloat16 [B, groups, H, F, E], of `gpu_states.states`.
        sums: float32 [B, groups, H, F], likewise.
    """
    batch, length, heads, width = q.shape
    values = v.shape[3]
    token_row = [] if rows is None else [((COLUMNS,), jnp.float32)]
    return hopper.call(
        functools.partial(_kernel, spec, rows is not None),
        (q, k, v, state, sums, spec.features.selectors, *([] if rows is None else [rows])),
        out=((v.shape, v.dtype), ((batch, heads, length), jnp.float32)),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS, width), q.dtype),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.SMEM((WARPGROUPS, ROWS, values), v.dtype),
            gpu_tile.state_ring(spec, values),
            hopper.ring(((COLUMNS, width), k.dtype), ((COLUMNS, values), v.dtype), *token_row),
        ),
        grid=gpu_tile.grid(q),
        interpret=spec.interpret,
        name="linear_attention_outputs",
    )


def _kernel(spec: Spec, has_rows: bool, q, k, v, state, sums, selectors, *rest):
    """A block: the queries [BLOCK, Dx] of a head, the keys of its group up to them -> out [BLOCK, E], total [BLOCK]."""
    rows = rest[0] if has_rows else None
    out, total_out, q_tiles, q_filled, staged, past_ring, ring = rest[has_rows:]
    block = gpu_tile.Block.here(spec)
    warpgroup = jax.lax.axis_index("warpgroup")
    past_tiles = spec.tiles_of_past(block.group)
    past = gpu_tile.start_state(past_ring, spec, past_tiles, state, sums, selectors, block)
    tiles = gpu_tile.start_keys(ring, block, k, v, rows)

    own = block.rows(warpgroup)
    q_tile = q_tiles.at[warpgroup]
    plgpu.copy_gmem_to_smem(q.at[block.batch, own, block.head], q_tile, q_filled.at[warpgroup])
    query_run = from_past = None
    if has_rows:
        query_run, from_past = (
            gpu_tile.load_token_row(rows, which, block, warpgroup)
            for which in (AS_QUERY, FROM_PAST)
        )
    plgpu.barrier_wait(q_filled.at[warpgroup])

    def meet_past(_, pieces, carry):
        numerator, total = carry
        state_tile, sums_tile, *matrices = pieces
        features = gpu_tile.features_of(q_tile, gpu_tile.picked(q_tile, matrices))
        features = gpu_tile.rows_kept(features, from_past)
        sums_of_tile = along(hopper.load_vector(sums_tile, 1), features.shape, 1)
        total += (features * sums_of_tile).sum(axis=1)
        return hopper.add_product(numerator, features, state_tile, spec.interpret), total

    def meet_keys(i, pieces, carry):
        numerator, total = carry
        k_tile, v_tile, *key_run = pieces
        weights = gpu_tile.weigh(spec, hopper.product(q_tile, k_tile.T))
        weights = gpu_tile.where_allowed(
            weights,
            own.start,
            (block.first + i) * COLUMNS,
            (query_run, hopper.load_vector(key_run[0], 1)) if has_rows else None,
            queries_axis=0,
        )
        total += weights.sum(axis=1)
        return hopper.add_product(numerator, weights, v_tile, spec.interpret), total

    carry = hopper.zeros(ROWS, v.shape[3]), hopper.zeros(ROWS)
    carry = past.fold(meet_past, carry)
    numerator, total = tiles.fold(meet_keys, carry)
    total += spec.eps
    total_out[block.batch, block.head, own] = total
    if spec.normalize:
        numerator /= along(total, numerator.shape, 0)
    hopper.write_tile(numerator, staged.at[warpgroup], out.at[block.batch, own, block.head])
