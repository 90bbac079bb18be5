"""The backward of the state-space-duality scan on TPU, one chunk of a few heads, from the last chunk to the first.

With S and S' the states before and after a tile of tokens, dS' the gradient of the latter, and for s <= t
w_st = (C_t · B_s) exp(total_t - total_s):

    dux_s   = Σ_t w_st dy_t + exp(total_Q - total_s) dS' B_s, the gradient of dt_s x_s
    dC_t    = Σ_heads Σ_s (dt_s x_s · dy_t) exp(total_t - total_s) B_s + exp(total_t) Sᵀ dy_t
    dB_s    = Σ_heads Σ_t (dt_s x_s · dy_t) exp(total_t - total_s) C_t + exp(total_Q - total_s) dt_s dS'ᵀ x_s
    dS      = exp(total_Q) dS' + Σ_t exp(total_t) dy_t C_tᵀ
    dtotal_t = Σ_s w_st (dt_s x_s · dy_t) + exp(total_t) C_t · Sᵀ dy_t - dt_t x_t · dux_t,
               and for the last token dS' · S' besides.

What a token reads of itself cancels in the last line, as both terms have the same rounded weight. The states come from
the forward. The sums from t on that the gradient of dt A is, and dS' · S' with them, are over 128 tokens, which may be
several tiles. That of A, Σ_t dt_t Σ_{u>=t} dtotal_u, is Σ_u dtotal_u Σ_{t<=u} dt_t, which does not wait for the former
sums. Pairs of tokens are [s, (head, t)] here, so that sums over s are over sublanes; dt_s is in the decay, as
exp(total_t - total_s + log dt_s), so that nothing else is scaled by it, and is divided out of its own gradient.

The passage of a pack of heads through its products is cut into stages where a result is waited for. What is left of
sums over heads is done once a tile, by its last pack, and of sums over tokens once a register of these; that of B and C
and that of dt go side by side, so that few stages are left when the last pack is done. The gradient of B is computed as
B comes, and that of C on lanes, with tokens of several heads, which are summed for a whole register.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pipelined import pipelined
from pallas_kernels.ssd_scan.tpu_blocks import LANES
from pallas_kernels.ssd_scan.tpu_chunk import (
    FEW,
    LAST,
    PLAIN,
    Columns,
    Spec,
    States,
    all_registers,
    block_diagonal,
    column,
    for_pack,
    from_rows,
    head_blocks,
    heads_of,
    next_heads,
    over_heads,
    over_registers,
    packs,
    running_sums,
    scales,
    seen,
    stacked,
    store_row,
    sums_in_row,
    wide,
)
from pallas_kernels.tpu_dot import dot

# Packs that a stage takes one after the other, and of the first of them, by whether there are more than `FEW`: of few
# the first goes ahead, so that the longest of what is left after the last products is begun sooner.
TOGETHER = {False: FEW, True: 3}
FIRST = {False: 1, True: 2}


def kernel(
    spec: Spec, x, dt, A, total, B, C, D, marks, pasts, last, d_y, d_last,
    d_x, d_dt, d_A, d_B, d_C, d_D, d_initial,
    carry, after, d_rows, d_ends, d_steps, wide_d_B, wide_d_C, mask,
) -> None:  # fmt: skip
    """Chunks come from the last to the first; the rest of the grid is that of the forward.

    Args:
        spec: static arguments.
        x: as in `tpu_forward.kernel`; so are dt, A, B, C, D, marks.
        total: ref like dt, the forward's `all_totals`.
        pasts: ref [tiles, N, channels], the state before each tile.
        last: ref float32 [N, channels], the state after the last chunk.
        d_y: ref [tokens, channels].
        d_last: ref float32 [N, channels]; None: 0.
        d_x: ref like x.
        d_dt: ref like dt.
        d_A: ref float32 [1, heads], the chunk's part.
        d_B: ref like B.
        d_C: ref like C.
        d_D: ref float32 [1, channels], the chunk's part; None: not wanted.
        d_initial: ref float32 [N, channels]; None: not wanted.
        carry: scratch float32 [steps, N, channels], the gradient of the state after a tile.
        after: scratch [steps, N, channels], the state after the chunk; None: of the only chunk, where it is `last`.
        d_rows: scratch float32 [tiles, heads, 128], gradients of the totals as `tpu_chunk.rows` has these.
        d_ends: scratch float32 [registers, heads, 128], what the last total of each gets besides, by channels.
        d_steps: scratch float32 [registers, heads, 128 tokens], what dt gets, times dt.
        wide_d_B: scratch float32 like B, summed over heads.
        wide_d_C: scratch float32 [N, tokens], summed over heads.
        mask: scratch float32 [tokens of a tile, (head, token)], `_unseen` where there are no marks.
    """
    sizes, chunk, step = spec.blocks, pl.program_id(2), pl.program_id(3)

    @pl.when(chunk == 0)
    def _():
        carry[step] = jnp.zeros_like(carry[step]) if d_last is None else d_last[...]
        if after is not None:
            after[step] = last[...].astype(after.dtype)

    _walk_back(
        sizes, step == 0, x, dt, A, total, B, C, D, marks, pasts, d_y,
        d_x, d_dt, d_A, d_B, d_C, d_D,
        carry.at[step], last if after is None else after.at[step], d_rows, d_ends, d_steps, wide_d_B, wide_d_C, mask,
    )  # fmt: skip
    if after is not None:
        after[step] = pasts[0]

    if d_initial is not None:

        @pl.when(chunk == pl.num_programs(2) - 1)
        def _():
            d_initial[...] = carry[step]


def _walk_back(
    sizes, is_first, x, dt, A, total, B, C, D, marks, pasts, d_y,
    d_x, d_dt, d_A, d_B, d_C, d_D,
    adjoint, after, d_rows, d_ends, d_steps, wide_d_B, wide_d_C, mask,
):  # fmt: skip
    """From the last tile to the first, with `adjoint` [N, channels] the gradient of the state after a tile."""
    dtype = x.dtype
    if marks is None:
        mask[...] = _unseen(sizes, 0, None)
    resets = None if marks is None else column(marks[2:3])

    totals = [stacked(sizes, total, group) for group in range(sizes.groups)]
    registers = all_registers(sizes, dt, totals, marks)
    written = [Columns(sizes, of.written) for of in registers]

    # The sum of dt from the beginning of its register to each token.
    steps = jnp.concatenate([stacked(sizes, dt, group) for group in range(sizes.groups)])
    so_far = jnp.split(running_sums(steps, LANES, dtype), sizes.groups)

    B, C = States(sizes, B), States(sizes, C)

    @functools.cache
    def of_place(group, place):
        return scales(sizes, place, registers[group])

    @functools.cache
    def of_tile(tile):
        hidden = mask[...] if marks is None else _unseen(sizes, tile, marks)
        similarities = dot(B.rows(tile), C.turned(tile), PLAIN)
        return of_place(sizes.group(tile), sizes.place(tile)), hidden, similarities

    def of_tokens(x, y):
        """x yᵀ of x [N, i] and y [token, i], or as B comes its transpose."""
        return dot(x, y, LAST) if sizes.turned else dot(y, x, LAST)

    def bring(pack, _):
        of_tile(pack.tile)
        return written[sizes.group(pack.tile)].of_pack(pack)

    def prepare(pack, brought):
        for_tokens, for_channels = brought
        scale, hidden, similarities = of_tile(pack.tile)
        decays = jnp.exp2(scale.row("total", pack) - for_tokens + hidden)
        weights = (for_pack(sizes, similarities) * decays).astype(dtype)
        reads = for_pack(sizes, C.turned(pack.tile)) * scale.row("from_past", pack).astype(dtype)
        left = jnp.concatenate([weights, reads], axis=0)
        exponents = scale.row("ends", pack) - for_channels
        if resets is not None:
            exponents += resets[pack.tile * sizes.tile :][: sizes.tile]
        to_end = jnp.exp2(exponents)
        writes = x[pack.tokens, pack.channels] * to_end.astype(dtype)
        blocks = head_blocks(sizes, d_y[pack.tokens, pack.channels])
        return decays, weights, left, blocks, to_end, writes

    def multiply(pack, prepared):
        decays, weights, left, blocks, *of_end = prepared
        state = pasts[pack.tile, :, pack.channels]
        right = jnp.concatenate([x[pack.tokens, pack.channels], state], axis=0)
        # First what the next stage takes. A matrix unit takes an operand that it has to turn at half the speed.
        gradients = dot(left, block_diagonal(blocks), PLAIN)
        products = dot(right, block_diagonal([block.T for block in blocks]), PLAIN)
        return decays, weights, gradients, products, *of_end

    def advance(pack, multiplied):
        decays, weights, gradients, products, to_end, writes = multiplied
        d_after = adjoint[:, pack.channels]
        rounded = d_after.astype(dtype)
        returns = dot(B.rows(pack.tile), rounded, PLAIN)
        d_B_part = of_tokens(rounded, writes)
        if (pack.tile + 1) * sizes.tile % LANES == 0:
            state = after if pack.tile == sizes.tiles - 1 else pasts.at[pack.tile + 1]
            at_end = _sum(d_after * wide(state[:, pack.channels]))
            number = pack.tile * sizes.tile // LANES
            store_row(d_ends.at[number], pack.head, at_end, sizes.dim)
        kept = d_after * of_tile(pack.tile)[0].row("kept", pack)
        adjoint[:, pack.channels] = kept + gradients[sizes.tile :]
        d_input = gradients[: sizes.tile] + returns * to_end
        return decays, weights, d_input, products, d_B_part

    sums, by_channel, of_states, of_rates = {}, {}, {}, []

    def finish(pack, advanced):
        decays, weights, d_input, products, d_B_part = advanced
        at, scale = (pack.tokens, pack.channels), of_tile(pack.tile)[0]
        of_step = wide(x[at]) * d_input
        if D is not None:
            d_input += wide(d_y[at]) * D[:, pack.channels]
        d_x[at] = d_input.astype(dtype)

        pairs, read = products[: sizes.tile], products[sizes.tile :]
        read *= scale.row("from_past", pack)
        read_again = for_pack(sizes, wide(C.turned(pack.tile))) * read
        d_totals = _sum(jnp.concatenate([pairs * wide(weights), read_again], axis=0))
        store_row(d_rows.at[pack.tile], pack.head, d_totals, sizes.tile)

        parts = over_registers(sizes, pairs * decays), over_registers(sizes, read), d_B_part
        before = sums.get(pack.tile)
        sums[pack.tile] = (
            parts if before is None else [x + y for x, y in zip(before, parts, strict=True)]
        )
        return of_step

    def add_up(pack, of_step):
        merged = merge(pack)
        add_channels(pack, of_step)
        return merged

    def add_channels(pack, of_step):
        """Sums over channels, turned for whole registers of tokens; tiles come from the last."""
        tiles = [of_step, *by_channel.pop(pack.head, [])]
        if pack.tile * sizes.tile % LANES:
            by_channel[pack.head] = tiles
            return
        turned = jnp.concatenate(tiles, axis=0).T
        for i in range(sizes.pack):
            of_head = turned[i * sizes.dim : (i + 1) * sizes.dim]
            d_steps[pack.tile * sizes.tile // LANES, pl.ds(pack.head + i, 1)] = _sum(of_head)

    def merge(pack):
        """By its last pack, the gradients of a tile's B, as this comes, and of its C, [N, (head, token)]."""
        if pack.head != sizes.heads - sizes.pack:
            return None
        d_similarities, d_C_tile, d_B_tile = sums.pop(pack.tile)
        d_similarities = d_similarities.astype(dtype)
        d_B_tile += of_tokens(C.turned(pack.tile), d_similarities)
        d_C_tile += dot(B.turned(pack.tile)[:, : sizes.tile], d_similarities, PLAIN)
        return d_B_tile, d_C_tile

    def join(pack, merged):
        """What there is of whole registers: those of B and C, of dt, times dt, and of dt A."""
        if merged is None:
            return None
        number, place = divmod(pack.tile * sizes.tile, LANES)
        tiles = [merged, *of_states.pop(number, [])]
        if place:
            of_states[number] = tiles
            return None
        of_B, of_C = zip(*tiles, strict=True)
        settled = settle(number)
        of_C = over_heads(sizes, of_C)
        return number, jnp.concatenate(of_B, axis=1 if sizes.turned else 0), of_C, settled

    def settle(number):
        """The gradients of dt, times dt, and of dt A, of 128 tokens."""
        in_register = LANES // sizes.tile
        by_tile = [d_rows[number * in_register + i] for i in range(in_register)]
        written = d_steps[number]
        d_total = from_rows(sizes, by_tile) - written
        ends = _by_head(sizes, d_ends[number])
        # Of dt times its sum from t on, which is not there yet: of each summand times the dt of all that have it.
        passed = heads_of(sizes, so_far[number // sizes.together], number)
        of_rates.append(d_total * passed + ends * passed[:, -1:])
        d_total = jnp.concatenate([d_total, ends], axis=1)
        return written, running_sums(d_total, LANES, dtype, reverse=True)

    def put(pack, of_register):
        if of_register is None:
            return
        number, of_B, of_C, (written, d_log_decay) = of_register
        lanes = pl.ds(number * LANES, LANES)
        on_lanes = (slice(None), lanes)
        at = on_lanes if sizes.turned else lanes
        d_B[at] = over_steps(wide_d_B, at, of_B)
        of_C = over_steps(wide_d_C, on_lanes, of_C)
        d_C[at] = of_C if sizes.turned else of_C.T
        dt_again = heads_of(sizes, registers[number // sizes.together].step, number)
        d_dt[:, lanes] = written / dt_again + A[...] * d_log_decay

    def over_steps(wide_sum, at, part):
        """The sum over the steps of heads so far."""
        if sizes.steps > 1:
            part += jnp.where(is_first, 0, wide_sum[at])
            wide_sum[at] = part
        return part.astype(dtype)

    by_tile = sorted(packs(sizes), key=lambda pack: (-pack.tile, pack.head))
    stages = (bring, prepare, multiply, advance, finish, add_up, join, put)
    are_many = len(by_tile) > FEW
    pipelined(by_tile, *stages, together=TOGETHER[are_many], first=FIRST[are_many])
    d_A[...] = sums_in_row(sum(of_rates), dtype)
    if d_D is not None:
        d_D[...] = _sum(wide(x[...]) * wide(d_y[...]))


def _unseen(sizes, tile, marks):
    """What to add to exponents [writing token, (head, reading token)]: 0 where the one is seen, and else -inf."""
    return jnp.where(seen(sizes, tile, marks, reading_on_rows=False), 0.0, -jnp.inf)


def _by_head(sizes, parts):
    """[heads, 128 channels], as `store_row` left them: in the row of a head what is its own, and else 0."""
    head, lane = (jax.lax.broadcasted_iota(jnp.int32, parts.shape, axis) for axis in (0, 1))
    beside = max(1, LANES // sizes.dim)
    out = parts
    for i in range(1, beside):
        out = jnp.where(head % beside == i, next_heads(parts, -i), out)
    return jnp.where(lane // sizes.dim % beside == head % beside, out, 0)


def _sum(x):
    """Over rows."""
    return jnp.sum(x, axis=0, keepdims=True)
