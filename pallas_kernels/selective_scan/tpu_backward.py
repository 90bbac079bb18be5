"""The backward of the selective scan on TPU: chunk after chunk from the last to the first, tokens likewise.

With g_t the adjoint of h_t, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, every gradient is a sum of products of g_t with
what the token t had: over states for u and Δ, over channels for B and C, over tokens for A.

The gradients of Δ and A through the decay have the same terms but for a factor, A and Δ. Both times its own factor sums
p_t = g_{t+1} exp(Δ_{t+1} A) h_t Δ_{t+1} A, over states or over tokens: one stack for the matrix unit, of which the sums
are divided, so that Δ and A may not be 0 (`_away_from_0`, `_step`).

The states of a step are computed again from the one before it, which the forward left, and are at once used on the way
back: way out and way back are of one basic block, a part of the channels after the other, so that a part's recurrence
does not wait for itself, and what is left in between stays in registers or in what the compiler spills.

Where vector units multiply bfloat16 and store two registers a cycle (`Spec.narrow`), the way out leaves the decay,
which is not computed again, and exp(Δ_t A) h_{t-1} Δ_t A in bfloat16, so that p is one product of what the matrix unit
takes anyway. There the sums over channels for B begin in the vector unit where a block has several parts: a matrix unit
takes the adjoints for them transposed, at half its pace, but once for all of the parts. Elsewhere it leaves the state
before: with two registers left of each state, stores bind on v5e, which has one a cycle.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cotangents import array_or_none, as_array
from pallas_kernels.selective_scan.tpu_blocks import LANES
from pallas_kernels.selective_scan.tpu_columns import (
    columns,
    columns_dtype,
    columns_of_steps,
    in_rows,
    rows_of_tokens,
    widened,
)
from pallas_kernels.selective_scan.tpu_tile import (
    LAST,
    LOG2_E,
    ROWS_OF_A_TILE,
    STEP,
    STEPS_OF_A_REGISTER,
    VMEM_LIMIT,
    Blocks,
    Spec,
    by_state,
    decay,
    dot,
    in_columns_of_own,
    in_lanes,
    lane_of,
    of_own,
    over_states,
    row,
    rows_of_steps,
    stack,
    stacks,
    states_of_registers,
    states_of_steps,
    step_of,
    sums,
    tiles,
)
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import shaped_like

# JAX 0.11 has it elsewhere.
_reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal
# What stands for steps and rates nearer to 0: the decay is 1 in float32 all the same, and their product is far from
# the least float32.
LEAST_STEP = 1.001 * 2.0**-60
LEAST_RATE = 2.0**-30
# Parts of a block whose way out comes before the way back of the first of them, by the schedules for v5e and v6e; of
# steps of a single part one.
PARTS_AHEAD = 3
# Steps in a trip: the more, the fewer ends at which the last products and the next columns are waited for; with four
# registers of columns the compiler spills what it gains. Steps of more parts are longer, so that ends cost them little,
# and take the compiler twice as long with twice as many in a trip: half as many are in theirs.
MOST_STEPS = 2 * STEPS_OF_A_REGISTER
MOST_PARTS_OF_MOST_STEPS = 4


def backward(spec: Spec, saved, cotangents):
    u, delta, A, B, C, D, z, resets, pasts = saved
    d_y, d_last = cotangents
    d_y, d_last = as_array(d_y, u), array_or_none(d_last)
    spec = dataclasses.replace(spec, unrolled=_steps_of_a_trip(spec))
    (batch, time, channels), states = u.shape, A.shape[0]
    chunks, channel_blocks = time // spec.chunk, channels // spec.channels
    dtype = columns_dtype(spec, u.dtype)
    B, C = (x.swapaxes(1, 2).astype(dtype) for x in (B, C))
    blocks = Blocks(spec, states, lambda c: chunks - 1 - c)
    skips, gates = D is not None, z is not None
    partial = u.dtype if channel_blocks == 1 else jnp.float32
    by_block = shaped_like(u, (batch, channel_blocks, states, time), partial)
    outputs = {
        "u": (shaped_like(u, u.shape, u.dtype), blocks.tokens),
        "delta": (shaped_like(u, u.shape, delta.dtype), blocks.tokens),
        "A": (shaped_like(u, (batch, states, channels), jnp.float32), blocks.state),
        **dict.fromkeys("BC", (by_block, blocks.partial_columns)),
        "D": (shaped_like(u, (batch, 1, channels), jnp.float32), blocks.state_row)
        if skips
        else (None, None),
        "z": (shaped_like(u, u.shape, u.dtype), blocks.tokens) if gates else (None, None),
        "state": (shaped_like(u, (batch, states, channels), jnp.float32), blocks.state)
        if spec.has_state
        else (None, None),
    }
    gradients = tpu_call(
        functools.partial(_kernel, spec),
        grid=(batch, channel_blocks, chunks),
        in_specs=(
            blocks.tokens,
            blocks.tokens,
            blocks.per_channel,
            *[blocks.columns] * 2,
            blocks.channel_row if skips else None,
            blocks.tokens if gates else None,
            None if resets is None else blocks.resets,
            blocks.pasts,
            blocks.tokens,
            None if d_last is None else blocks.state,
        ),
        out_specs=tuple(block for _, block in outputs.values()),
        out_shape=tuple(shape for shape, _ in outputs.values()),
        scratch_shapes=(
            *[rows_of_steps(spec)] * 3,
            rows_of_steps(spec, jnp.uint32) if spec.sums_lanes else None,
            *[columns_of_steps(spec, states, dtype)] * 2,
            states_of_steps(spec, states, u.dtype, STEP),
            states_of_steps(spec, states, u.dtype, spec.group(states)) if gates else None,
            rows_of_tokens(LANES, states),
            rows_of_tokens(LANES, states) if gates else None,
            *[states_of_registers(_registers(spec), states, u.dtype)] * 2,
            None if spec.has_state else pltpu.VMEM((states, spec.channels), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            # Blocks are those of the grid.
            disable_bounds_checks=True,
        ),
        interpret=spec.interpret,
        name="selective_scan_backward",
    )(u, delta, A, B, C, D, z, resets, pasts, d_y, d_last)
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_state = gradients
    d_A = d_A.sum(axis=0)
    d_D = None if d_D is None else d_D.sum(axis=0)
    d_B, d_C = (x.sum(axis=1).swapaxes(1, 2).astype(u.dtype) for x in (d_B, d_C))
    return d_u, d_delta, d_A, d_B, d_C, d_D, d_z, None, d_state


def _kernel(
    spec, u, delta, A, B, C, D, z, resets, past, d_y, d_last,
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_initial,
    steps, inputs, d_reads, narrow_inputs, to_state, from_state, writing, reading,
    B_rows, C_rows, own_B, own_C, adjoint,
):  # fmt: skip
    """One chunk of one block of channels.

    Scratch: of the steps at hand rows of Δ, Δ u, the gradients of what is read, and Δ u as `_twice_in_bfloat16`;
    columns of B and C, spread over lanes; and `by_state` of both. Of all tokens with their columns in the register at
    hand B and C as rows; in the registers of a trip `of_own` of the products for the gradients of both. From chunk to
    chunk the adjoint, which is where the gradient of the first state is wanted, if it is.
    """
    adjoint = d_initial if adjoint is None else adjoint

    @pl.when(pl.program_id(2) == 0)
    def _():
        adjoint[...] = jnp.zeros_like(adjoint) if d_last is None else d_last[...]
        d_A[...] = jnp.zeros_like(d_A)
        if d_D is not None:
            d_D[...] = jnp.zeros_like(d_D)

    base2_A = _away_from_0(A[...], LEAST_RATE) * LOG2_E
    dtype = u.dtype
    way_out = functools.partial(
        _way_out, spec, u, base2_A, reading, D, z, resets, past, d_y, d_z,
        steps, inputs, d_reads, to_state,
    )  # fmt: skip
    way_back = functools.partial(
        _way_back, spec, dtype, base2_A, resets, adjoint, steps, d_reads, narrow_inputs, from_state
    )
    add_up = functools.partial(
        _add_up, spec, u, D, d_u, d_delta, d_A, d_D, steps, inputs, d_reads, writing
    )

    def prepare(at):
        step = _step(delta[at.tokens])
        taken = step * _wide(u[at.tokens])
        steps[at.slot], inputs[at.slot] = step, taken
        if spec.sums_lanes:
            narrow_inputs[at.slot] = _twice_in_bfloat16(taken)
        d_read = _wide(d_y[at.tokens])
        d_reads[at.slot] = d_read if z is None else d_read * jax.nn.silu(_wide(z[at.tokens]))
        registers = [ref[:, at.whole_register] for ref in (B, C)]
        to_state[at.slot], from_state[at.slot] = columns(registers, at)

    def turn(at):
        writing[at.slot] = by_state(in_rows(B, B_rows, at), dtype, STEP, reverse=True)
        if z is not None:
            reading[at.slot] = by_state(in_rows(C, C_rows, at), dtype, spec.group(C.shape[0]))

    def finish(at, register):
        for gradient, of_states in ((d_B, own_B), (d_C, own_C)):
            columns_of_own = in_columns_of_own(of_states[register])
            gradient[:, at.whole_register] = columns_of_own.astype(gradient.dtype)

    _for_each_step(spec, dtype, turn, prepare, way_out, way_back, add_up, finish, own_B, own_C)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_A[...] /= base2_A


def _for_each_step(
    spec, dtype, turn, prepare, way_out, way_back, add_up, finish, own_B, own_C,
):  # fmt: skip
    """Takes the steps of a chunk from the last to the first through their stages; a step is prepared before the one
    ahead of it, as in `for_each_step`, and a register finished when the products of its last step are long there: the
    last of a trip when the next has begun, the one before it with the last step of the trip.
    """
    count, parts = spec.chunk // STEP, spec.parts(spec.matrix_width)
    unrolled, registers = spec.unrolled, _registers(spec)
    ahead = PARTS_AHEAD if len(parts) > 1 else 1

    def at(trip, place):
        # After the last comes the first again, and before the first the last, for nothing.
        index = count - 1 - (unrolled * trip + place + count) % count
        lane = lane_of(-1 - place if spec.whole_registers else index)
        return step_of(spec, index, place, lane)

    def register(place):
        return place // STEPS_OF_A_REGISTER

    def trip(i, _):
        waiting = []

        def back(place, part, left, to_B):
            now = at(i, place)
            to_B.append(add_up(now, part, *way_back(now, part, left)))
            if len(to_B) == len(parts):
                products = _over_channels(spec, sum(to_B), dtype)
                own_B[register(place), now.lanes] = of_own(products, dtype, STEP, reverse=True)

        for place in range(unrolled):
            now = at(i, place)
            turn(at(i, place + 1))
            to_B, to_C = [], 0
            for part in parts:
                if len(waiting) == ahead:
                    back(*waiting.pop(0))
                left, read = way_out(now, part)
                to_C += read
                waiting.append((place, part, left, to_B))
            if place == 0:
                # Before the first of its rows is of this trip.
                finish(at(i, -1), registers - 1)
            elif place == unrolled - 1 and registers > 1:
                finish(at(i, STEPS_OF_A_REGISTER - 1), 0)
            own_C[register(place), now.lanes] = of_own(to_C, dtype, STEP)
            prepare(at(i, place + 1))
        for part in waiting:
            back(*part)

    prepare(at(0, 0))
    turn(at(0, 0))
    jax.lax.fori_loop(0, count // unrolled, trip, None)
    finish(at(0, -1), registers - 1)


def _steps_of_a_trip(spec: Spec) -> int:
    few_parts = len(spec.parts(spec.matrix_width)) <= MOST_PARTS_OF_MOST_STEPS
    return min(spec.unrolled, MOST_STEPS if few_parts else MOST_STEPS // 2)


def _registers(spec: Spec) -> int:
    """Registers that have the columns of a trip."""
    return max(1, spec.unrolled // STEPS_OF_A_REGISTER)


def _way_out(
    spec, u, base2_A, reading, D, z, resets, past, d_y, d_z,
    steps, inputs, d_reads, to_state, at, part,
):  # fmt: skip
    """The states of a part in a step, and with them the gradients of z and, which is returned, of C.

    Returns:
        What is left of each token for the way back: decay and what p is a multiple of, or else the state before it;
        the products over channels for the gradient of C.
    """
    tokens, rounded = at.tokens, u.dtype == jnp.bfloat16
    h, passed, left = _wide(past[at.index, :, part]), [], []
    for t in range(STEP):
        exponent = row(steps, at, t, part) * base2_A[:, part]
        kept = decay(exponent, resets, at, t)
        before, h = h, kept * h
        left.append((kept, (h * exponent).astype(u.dtype)) if spec.narrow else before)
        h += row(inputs, at, t, part) * widened(to_state[at.slot, t], part)
        passed.append(h)
    if z is not None:
        ungated = over_states(reading, at, passed, rounded=rounded)
        if D is not None:
            ungated += D[:, part] * _wide(u[tokens, part])
        gate = _wide(z[tokens, part])
        half = jax.nn.sigmoid(gate)
        d_gate = _wide(d_y[tokens, part]) * ungated * half * (1 + gate * (1 - half))
        d_z[tokens, part] = d_gate.astype(d_z.dtype)
    return left, dot(d_reads[at.slot, :, part], stack(passed), LAST, rounded=rounded)


def _way_back(
    spec, dtype, base2_A, resets, adjoint, steps, d_reads, narrow_inputs, from_state, at, part, left,
):  # fmt: skip
    """The adjoints of a part's states in a step.

    Args:
        at, part: the step and the channels.
        left: what `_way_out` left.

    Returns:
        Of each token, the last first: the adjoint, p, and the products with Δ u where `Spec.sums_lanes`.
    """
    num_states = base2_A.shape[0]
    g, passed, by_exponents, written = adjoint[:, part], [], [], []
    for t in reversed(range(STEP)):
        g += widened(from_state[at.slot, t], part) * row(d_reads, at, t, part)
        if spec.narrow:
            kept, factor = left[t]
            passed.append(g.astype(dtype))
            by_exponents.append(passed[-1] * factor)
            if spec.sums_lanes:
                taken = _in_bfloat16(row(narrow_inputs, at, t, part), num_states)
                written.append(in_lanes(passed[-1] * taken))
            g *= kept
        else:
            passed.append(g)
            exponent = row(steps, at, t, part) * base2_A[:, part]
            g *= decay(exponent, resets, at, t)
            by_exponents.append(g * left[t] * exponent)
    adjoint[:, part] = g
    return passed, by_exponents, written


def _add_up(
    spec, u, D, d_u, d_delta, d_A, d_D, steps, inputs, d_reads, writing,
    at, part, passed, by_exponents, written,
):  # fmt: skip
    """The gradients that are sums of what `_way_back` returns, of a part in a step.

    Returns:
        What `_over_channels` takes.
    """
    dtype, rounded, num_states = u.dtype, u.dtype == jnp.bfloat16, passed[0].shape[0]
    tokens, step, taken = at.tokens, steps[at.slot, :, part], inputs[at.slot, :, part]

    def over_states_and_tokens():
        group = spec.group(num_states)
        for_decay = sums(num_states, group, reverse=True)
        # The last tokens come first.
        of_groups = [dot(for_decay, x, rounded=rounded) for x in stacks(by_exponents, group)][::-1]
        to_exponents = jnp.concatenate([x[:group] for x in of_groups], axis=0)
        return to_exponents, sum(x[group:] for x in of_groups)

    def over_channels():
        if spec.sums_lanes:
            return stack(written)
        of_tiles = [x.astype(dtype) for x in tiles(passed, ROWS_OF_A_TILE)]
        return jnp.concatenate([dot(taken.astype(dtype), x, LAST) for x in of_tiles], axis=1)

    # Products keep their order. On a wide matrix unit that of a tile begins before all of the stack is there, and that
    # of the whole stack does not.
    if spec.narrow:
        to_B, (to_exponents, to_rates) = over_channels(), over_states_and_tokens()
    else:
        (to_exponents, to_rates), to_B = over_states_and_tokens(), over_channels()
    d_write, first = 0, 0
    for adjoints in tiles(passed, spec.matrix_width):
        last = first + len(adjoints)
        d_write += dot(writing[at.slot, :, first:last], adjoints.astype(dtype))
        first = last
    to_u = d_write * step
    if D is not None:
        d_read = d_reads[at.slot, :, part]
        to_u += D[:, part] * d_read
        d_skip = d_read * _wide(u[tokens, part])
        d_D[:, part] += jnp.sum(d_skip, axis=0, keepdims=True)
    d_u[tokens, part] = to_u.astype(d_u.dtype)
    d_A[:, part] += to_rates
    to_delta = (to_exponents * (1 / LOG2_E) + d_write * taken) * _inverse(step, rounded=rounded)
    d_delta[tokens, part] = to_delta.astype(d_delta.dtype)
    return to_B


def _over_channels(spec: Spec, to_B, dtype):
    """Products over channels for the gradient of B, of the sum of what `_add_up` gives for the parts of a block."""
    return dot(jnp.ones((STEP, LANES), dtype), to_B, LAST) if spec.sums_lanes else to_B


def _step(delta):
    """Δ in float32, but for 0: the constant is lost in all steps but the least, and no bfloat16."""
    if delta.dtype == jnp.float32:
        return _away_from_0(delta, LEAST_STEP)
    return _wide(delta) + LEAST_STEP


def _twice_in_bfloat16(x):
    """Float32 -> uint32, both halves of which are the number in bfloat16: a row of it spreads over a state in it."""
    bits = jax.lax.bitcast_convert_type(_wide(x.astype(jnp.bfloat16)), jnp.uint32)
    return bits | (bits >> 16)


def _in_bfloat16(twice, states: int):
    """Such a row [1, part] -> bfloat16 [states, part]."""
    return pltpu.bitcast(jnp.broadcast_to(twice, (states // 2, twice.shape[1])), jnp.bfloat16)


def _away_from_0(x, least: float):
    return jnp.where(jnp.abs(x) < least, least, x)


def _inverse(x, *, rounded: bool):
    """1 / x; `rounded`: as the unit for transcendental functions has it.

    That is of more digits than bfloat16: where a division is of float32, the compiler takes one of Newton's steps from
    there, or none.
    """
    return _reciprocal(x, approx=True) if rounded else 1 / x


def _wide(x):
    return x.astype(jnp.float32)
