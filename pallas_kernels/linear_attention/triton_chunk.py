"""The Triton kernels of linear attention: states before every chunk, outputs, and the gradients.

One kernel walks the chunks and leaves the state before each in HBM; then all tiles of tokens are independent, those of
a chunk meet each other by the weights and all earlier ones by the state. With s over the keys and t over the queries of
a chunk, S the state before it, Z the one after it and u the gradient of the sums:

    sums_t = Σ_{s<=t} w_st v_s + φ(q_t) S         dφ(q_t) = Σ_{s<=t} dw_st φ(k_s) + u_t Sᵀ
    Z = S + Σ_s φ(k_s)ᵀ v_s                       dφ(k_s) = Σ_{t>=s} dw_st φ(q_t) + v_s dZᵀ
    dS = dZ + Σ_t φ(q_t)ᵀ u_t                     dv_s = Σ_{t>=s} w_st u_t + φ(k_s) dZ

with w_st = φ(k_s) · φ(q_t) and dw_st = v_s · u_t + the gradient of the sum of weights: a column of ones stands beside
the values. dS has the form of Z with time reversed, so that one kernel, `linear_attention_states`, makes both.
"""

import triton
import triton.language as tl

from pallas_kernels.linear_attention.triton_features import (
    activation_slope,
    expand,
    feature_rows,
    operand,
    pull,
    weigh,
    weigh_slope,
)
from pallas_kernels.triton_tiles import exact_dot as dot
from pallas_kernels.triton_tiles import load_tile, store_tile, vector_pointers


@triton.jit
def linear_attention_states(
    x,
    y,
    weights,
    runs,
    chunk_runs,
    initial,
    initial_sum,
    states,
    state_sums,
    last,
    last_sum,
    s: tl.constexpr,
    reverse: tl.constexpr,
):
    """A program: one block of features and values of a head -> the sum of φ(x)ᵀ y before each chunk.

    Args:
        x: [B, T, H, D].
        y: [B, T, H, Dv].
        weights: of each token in the sum of φ(x), float32 [B, H, T]; None: 1.
        runs: int32 [B, T], `segments.runs`; None: one segment.
        chunk_runs: int32 [B, chunks + 1], the run that the state before each chunk is of, and the state at the end.
        initial: float32 [B, H, F, Dv], what the sums begin with; None: 0.
        initial_sum: float32 [B, H, F].
        states: [B, H, chunks, F, Dv].
        state_sums: float32 [B, H, chunks, F].
        last: float32 [B, H, F, Dv], the sum over all chunks.
        last_sum: float32 [B, H, F].
        s: static arguments.
        reverse: whether "before" means later: the last chunk comes first, and takes the queries' part in segments.
    """
    program = tl.program_id(0)
    value_block, program = program % s.num_value_blocks, program // s.num_value_blocks
    block, head_row = program % s.num_feature_blocks, program // s.num_feature_blocks
    batch, head = head_row // s.q.heads, head_row % s.q.heads
    feature, is_feature = feature_rows(s, block)
    value = value_block * s.values + tl.arange(0, s.values)
    offsets = feature[:, None] * s.v.dim + value[None, :]
    exists = is_feature[:, None] & (value < s.v.dim)[None, :]
    of_head = head_row.to(tl.int64) * s.num_features
    carry = tl.full((s.features, s.values), 0, tl.float32)
    carry_sum = tl.full((s.features,), 0, tl.float32)
    if initial is not None:
        carry += tl.load(initial + of_head * s.v.dim + offsets, mask=exists, other=0.0)
        carry_sum += tl.load(initial_sum + of_head + feature, mask=is_feature, other=0.0)
    for step in tl.range(0, s.num_chunks):
        chunk = s.num_chunks - 1 - step if reverse else step
        of_chunk = (head_row.to(tl.int64) * s.num_chunks + chunk) * s.num_features
        kept = carry.to(states.dtype.element_ty)
        tl.store(states + of_chunk * s.v.dim + offsets, kept, mask=exists)
        # Every block of values adds up the same sum of features.
        if value_block == 0:
            tl.store(state_sums + of_chunk + feature, carry_sum, mask=is_feature)
        run = 0
        if runs is not None:
            before, after = _chunk_runs(s, chunk_runs, batch, chunk)
            run = before if reverse else after
            carry = tl.where(before == after, carry, 0.0)
            carry_sum = tl.where(before == after, carry_sum, 0.0)
        first = chunk * s.blocks_of_chunk
        for tile in tl.range(first, tl.minimum(first + s.blocks_of_chunk, s.num_blocks)):
            start = tile * s.tokens
            x_tile = load_tile(x, s.q, batch, head, start, s.tokens)
            keep = _is_of(s, runs, batch, start, run)
            features = expand(s, x, x_tile, batch, head, start, block, keep)
            pointers = y + ((batch.to(tl.int64) * s.v.length + start) * s.v.heads + head) * s.v.dim
            token = tl.arange(0, s.tokens)[:, None]
            y_tile = tl.load(
                pointers + token * (s.v.heads * s.v.dim) + value[None, :],
                mask=(token < s.v.length - start) & (value < s.v.dim)[None, :],
                other=0.0,
            )
            carry = dot(tl.trans(features.to(y_tile.dtype)), y_tile, carry)
            if weights is not None:
                features *= _load_vector(s, weights, head_row, start)[:, None]
            carry_sum += tl.sum(features, axis=0)
    tl.store(last + of_head * s.v.dim + offsets, carry, mask=exists)
    if value_block == 0:
        tl.store(last_sum + of_head + feature, carry_sum, mask=is_feature)


@triton.jit
def linear_attention_outputs(
    q, k, v, runs, chunk_runs, states, state_sums, out, total, s: tl.constexpr
):
    """A program: a tile of queries of a head -> out, and the sums of the weights plus eps, float32 [B, H, T].

    Args:
        q: [B, T, H, D].
        k: [B, T, H, D].
        v: [B, T, H, Dv].
        runs: as `linear_attention_states` has it; so are chunk_runs, states, state_sums and s.
        out: [B, T, H, Dv].
        total: float32 [B, H, T].
    """
    head_row, tile = tl.program_id(0) // s.num_blocks, tl.program_id(0) % s.num_blocks
    batch, head, start = head_row // s.q.heads, head_row % s.q.heads, tile * s.tokens
    chunk = tile // s.blocks_of_chunk
    q_tile = load_tile(q, s.q, batch, head, start, s.tokens)
    q_operand = operand(s, q_tile)
    numerator = tl.full((s.tokens, s.v.width), 0, tl.float32)
    weight_sum = tl.full((s.tokens,), 0, tl.float32)
    for key_tile in tl.range(chunk * s.blocks_of_chunk, tile + 1):
        key_start = key_tile * s.tokens
        k_operand = operand(s, load_tile(k, s.q, batch, head, key_start, s.tokens))
        v_tile = load_tile(v, s.v, batch, head, key_start, s.tokens)
        weights = weigh(s, dot(q_operand, tl.trans(k_operand)))
        weights = tl.where(tl.trans(_allowed(s, runs, batch, start, key_start)), weights, 0.0)
        numerator = dot(weights.to(v_tile.dtype), v_tile, numerator)
        weight_sum += tl.sum(weights, axis=1)
    before, _ = _chunk_runs(s, chunk_runs, batch, chunk)
    keep = _is_of(s, runs, batch, start, before)
    for block in tl.range(0, _blocks_of_past(s, chunk)):
        features = expand(s, q, q_tile, batch, head, start, block, keep)
        state, state_sum = _load_state(s, states, state_sums, head_row, chunk, block)
        numerator = dot(features.to(state.dtype), state, numerator)
        weight_sum += tl.sum(features * state_sum[None, :], axis=1)
    weight_sum += s.eps
    if s.normalize:
        numerator = numerator / weight_sum[:, None]
    store_tile(out, s.v, batch, head, start, numerator)
    pointers, exists = vector_pointers(total, s.q.length, head_row, start, s.tokens)
    tl.store(pointers, weight_sum, mask=exists)


@triton.jit
def linear_attention_queries_gradient(
    q, k, v, d_sums, d_total, runs, chunk_runs, states, state_sums, dq, s: tl.constexpr
):
    """A program: a tile of queries of a head -> dq [B, T, H, D].

    Args:
        q: as `linear_attention_outputs` has it; so are the others.
        d_sums: the gradient of the sums of values, [B, T, H, Dv].
        d_total: that of the sum of the weights, float32 [B, H, T].
    """
    head_row, tile = tl.program_id(0) // s.num_blocks, tl.program_id(0) % s.num_blocks
    batch, head, start = head_row // s.q.heads, head_row % s.q.heads, tile * s.tokens
    chunk = tile // s.blocks_of_chunk
    q_tile = load_tile(q, s.q, batch, head, start, s.tokens)
    q_operand = operand(s, q_tile)
    u_tile = load_tile(d_sums, s.v, batch, head, start, s.tokens)
    u_total = _load_vector(s, d_total, head_row, start)[:, None]
    # Of the queries for the Taylor map, else of their features.
    gradient = tl.full((s.tokens, s.q.width), 0, tl.float32)
    for key_tile in tl.range(chunk * s.blocks_of_chunk, tile + 1):
        key_start = key_tile * s.tokens
        k_operand = operand(s, load_tile(k, s.q, batch, head, key_start, s.tokens))
        v_tile = load_tile(v, s.v, batch, head, key_start, s.tokens)
        products = dot(q_operand, tl.trans(k_operand))
        d_weights = weigh_slope(s, products, dot(u_tile, tl.trans(v_tile)) + u_total)
        d_weights = tl.where(tl.trans(_allowed(s, runs, batch, start, key_start)), d_weights, 0.0)
        gradient = dot(d_weights.to(k_operand.dtype), k_operand, gradient)
    if not s.is_taylor:
        gradient *= activation_slope(s, q_tile)
    before, _ = _chunk_runs(s, chunk_runs, batch, chunk)
    keep = _is_of(s, runs, batch, start, before)
    for block in tl.range(0, _blocks_of_past(s, chunk)):
        state, state_sum = _load_state(s, states, state_sums, head_row, chunk, block)
        d_features = dot(u_tile, tl.trans(state)) + u_total * state_sum[None, :]
        d_features = tl.where(keep[:, None], d_features, 0.0)
        gradient += pull(s, q, q_tile, batch, head, start, block, d_features)
    store_tile(dq, s.q, batch, head, start, gradient)


@triton.jit
def linear_attention_keys_gradient(
    q, k, v, d_sums, d_total, runs, chunk_runs, d_states, d_state_sums, dk, dv, s: tl.constexpr
):
    """A program: a tile of keys of a head -> dk [B, T, H, D] and dv [B, T, H, Dv].

    Args:
        q: as `linear_attention_queries_gradient` has it; so are the others.
        d_states: the gradient of the state after each chunk, [B, H, chunks, F, Dv].
        d_state_sums: float32 [B, H, chunks, F].
    """
    head_row, tile = tl.program_id(0) // s.num_blocks, tl.program_id(0) % s.num_blocks
    batch, head, start = head_row // s.q.heads, head_row % s.q.heads, tile * s.tokens
    chunk = tile // s.blocks_of_chunk
    k_tile = load_tile(k, s.q, batch, head, start, s.tokens)
    k_operand = operand(s, k_tile)
    v_tile = load_tile(v, s.v, batch, head, start, s.tokens)
    gradient = tl.full((s.tokens, s.q.width), 0, tl.float32)
    v_sums = tl.full((s.tokens, s.v.width), 0, tl.float32)
    for query_tile in tl.range(tile, tl.minimum((chunk + 1) * s.blocks_of_chunk, s.num_blocks)):
        query_start = query_tile * s.tokens
        q_operand = operand(s, load_tile(q, s.q, batch, head, query_start, s.tokens))
        u_tile = load_tile(d_sums, s.v, batch, head, query_start, s.tokens)
        u_total = _load_vector(s, d_total, head_row, query_start)[None, :]
        allowed = _allowed(s, runs, batch, query_start, start)
        products = dot(k_operand, tl.trans(q_operand))
        weights = tl.where(allowed, weigh(s, products), 0.0)
        v_sums = dot(weights.to(u_tile.dtype), u_tile, v_sums)
        d_weights = weigh_slope(s, products, dot(v_tile, tl.trans(u_tile)) + u_total)
        d_weights = tl.where(allowed, d_weights, 0.0)
        gradient = dot(d_weights.to(q_operand.dtype), q_operand, gradient)
    if not s.is_taylor:
        gradient *= activation_slope(s, k_tile)
    _, after = _chunk_runs(s, chunk_runs, batch, chunk)
    keep = _is_of(s, runs, batch, start, after)
    for block in tl.range(0, s.num_feature_blocks):
        d_state, d_state_sum = _load_state(s, d_states, d_state_sums, head_row, chunk, block)
        features = expand(s, k, k_tile, batch, head, start, block, keep)
        v_sums = dot(features.to(d_state.dtype), d_state, v_sums)
        d_features = dot(v_tile, tl.trans(d_state)) + d_state_sum[None, :]
        d_features = tl.where(keep[:, None], d_features, 0.0)
        gradient += pull(s, k, k_tile, batch, head, start, block, d_features)
    store_tile(dk, s.q, batch, head, start, gradient)
    store_tile(dv, s.v, batch, head, start, v_sums)


@triton.jit
def _load_vector(s: tl.constexpr, x, row, start):
    """Entries of [rows, T] for a tile of tokens, 0 past the end."""
    pointers, exists = vector_pointers(x, s.q.length, row, start, s.tokens)
    return tl.load(pointers, mask=exists, other=0)


@triton.jit
def _load_state(s: tl.constexpr, states, state_sums, head_row, chunk, block):
    """A block of features of a state and of its sum: [features, Dv], float32 [features]."""
    feature, is_feature = feature_rows(s, block)
    value = tl.arange(0, s.v.width)
    first = (head_row.to(tl.int64) * s.num_chunks + chunk) * s.num_features
    exists = is_feature[:, None] & (value < s.v.dim)[None, :]
    pointers = states + first * s.v.dim + feature[:, None] * s.v.dim + value[None, :]
    state_sum = tl.load(state_sums + first + feature, mask=is_feature, other=0.0)
    return tl.load(pointers, mask=exists, other=0.0), state_sum


@triton.jit
def _blocks_of_past(s: tl.constexpr, chunk):
    """Blocks of features of the state before a chunk: none before the first, unless a state came in."""
    return s.num_feature_blocks if s.has_initial else tl.where(chunk > 0, s.num_feature_blocks, 0)


@triton.jit
def _chunk_runs(s: tl.constexpr, chunk_runs, batch, chunk):
    """The runs that the states before and after a chunk are of."""
    before, after = chunk, chunk
    if chunk_runs is not None:
        pointer = chunk_runs + batch * (s.num_chunks + 1) + chunk
        before, after = tl.load(pointer), tl.load(pointer + 1)
    return before, after


@triton.jit
def _is_of(s: tl.constexpr, runs, batch, start, run):
    """Which tokens of a tile are there and, where there are runs, of this one."""
    result = start + tl.arange(0, s.tokens) < s.q.length
    if runs is not None:
        result = _load_vector(s, runs, batch, start) == run
    return result


@triton.jit
def _allowed(s: tl.constexpr, runs, batch, query_start, key_start):
    """Which keys of a tile which queries of another one see: [keys, queries]."""
    token = tl.arange(0, s.tokens)
    allowed = (key_start + token)[:, None] <= (query_start + token)[None, :]
    if runs is not None:
        of_queries = _load_vector(s, runs, batch, query_start)[None, :]
        of_keys = _load_vector(s, runs, batch, key_start)[:, None]
        allowed = allowed & (of_queries == of_keys) & (of_queries != 0)
    return allowed
