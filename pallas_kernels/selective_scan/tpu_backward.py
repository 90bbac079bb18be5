"""The backward of the selective scan on TPU: chunk after chunk from the last to the first, tokens likewise.

The states of a step are computed again from the one before it, which the forward left, and are at once used on the way
back (`tpu_backward_stages`): way out and way back are of one basic block, a part of the channels after the other, so
that a part's recurrence does not wait for itself. In bfloat16 what a way out leaves is in memory that the compiler
takes for memory: at places that it knows it would hold all in registers, of which it spills more than that is. In
float32, where products take most of the time, it is left to the compiler.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cotangents import array_or_none, as_array
from pallas_kernels.selective_scan import tpu_backward_stages as stages
from pallas_kernels.selective_scan.tpu_blocks import LANES
from pallas_kernels.selective_scan.tpu_columns import (
    columns,
    columns_dtype,
    columns_of_steps,
    in_rows,
    rows_of_tokens,
)
from pallas_kernels.selective_scan.tpu_tile import (
    LOG2_E,
    STEP,
    STEPS_OF_A_REGISTER,
    VMEM_LIMIT,
    Blocks,
    Spec,
    by_state,
    in_columns_of_own,
    lane_of,
    of_own,
    read_tiles,
    rows_of_steps,
    states_of_registers,
    states_of_steps,
    step_of,
    write_tiles,
)
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import shaped_like

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
            *[states_of_registers(spec, _registers(spec), states, u.dtype)] * 2,
            *stages.left_of_parts(spec, _parts_ahead(spec) + 1, states, u.dtype),
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
    B_rows, C_rows, own_B, own_C, decays, factors, adjoint,
):  # fmt: skip
    """One chunk of one block of channels.

    Scratch: of the steps at hand rows of Δ, Δ u, the gradients of what is read, and Δ u as `stages.twice_in_bfloat16`;
    columns of B and C, spread over lanes; and `by_state` of both. Of all tokens with their columns in the register at
    hand B and C as rows; in the registers of a trip `of_own` of the products for the gradients of both. Of parts whose
    way back is still to come what `stages.way_out` leaves. From chunk to chunk the adjoint, which is where the gradient
    of the first state is wanted, if it is.
    """
    adjoint = d_initial if adjoint is None else adjoint

    @pl.when(pl.program_id(2) == 0)
    def _():
        adjoint[...] = jnp.zeros_like(adjoint) if d_last is None else d_last[...]
        d_A[...] = jnp.zeros_like(d_A)
        if d_D is not None:
            d_D[...] = jnp.zeros_like(d_D)

    base2_A = stages.away_from_0(A[...], stages.LEAST_RATE) * LOG2_E
    dtype, rounded = u.dtype, u.dtype == jnp.bfloat16
    way_out = functools.partial(
        stages.way_out, spec, u, base2_A, reading, D, z, resets, past, d_y, d_z,
        steps, inputs, d_reads, to_state,
    )  # fmt: skip
    way_back = functools.partial(
        stages.way_back, spec, dtype, base2_A, resets, adjoint,
        steps, d_reads, narrow_inputs, from_state,
    )  # fmt: skip
    add_up = functools.partial(stages.add_up, spec, u, D, d_D, steps, inputs, d_reads, writing)

    def prepare(at):
        step = stages.positive(delta[at.tokens])
        taken = step * u[at.tokens].astype(jnp.float32)
        steps[at.slot], inputs[at.slot] = step, taken
        if spec.sums_lanes:
            narrow_inputs[at.slot] = stages.twice_in_bfloat16(taken)
        d_read = d_y[at.tokens].astype(jnp.float32)
        if z is not None:
            d_read *= jax.nn.silu(z[at.tokens].astype(jnp.float32))
        d_reads[at.slot] = d_read
        registers = [ref[:, at.whole_register] for ref in (B, C)]
        to_state[at.slot], from_state[at.slot] = columns(registers, at)

    def turn(at):
        of_B = by_state(in_rows(B, B_rows, at), STEP, rounded=rounded, reverse=True)
        write_tiles(writing, at.slot, of_B)
        if z is not None:
            of_C = by_state(in_rows(C, C_rows, at), spec.group(C.shape[0]), rounded=rounded)
            write_tiles(reading, at.slot, of_C)

    def write(at, register, to_B, to_u, to_delta, to_rates):
        for gradient, of_parts in ((d_u, to_u), (d_delta, to_delta)):
            gradient[at.tokens] = jnp.concatenate(of_parts, axis=1).astype(gradient.dtype)
        d_A[...] += jnp.concatenate(to_rates, axis=1)
        products = stages.over_channels(spec, sum(to_B), dtype)
        write_tiles(own_B, register, of_own(products, STEP, reverse=True), at.lanes)

    def finish(at, register):
        for gradient, of_states in ((d_B, own_B), (d_C, own_C)):
            columns_of_own = in_columns_of_own(read_tiles(of_states, register))
            gradient[:, at.whole_register] = columns_of_own.astype(gradient.dtype)

    _for_each_step(
        spec, decays, factors, own_C, turn, prepare, way_out, way_back, add_up, write, finish
    )

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_A[...] /= base2_A


def _for_each_step(
    spec, decays, factors, own_C, turn, prepare, way_out, way_back, add_up, write, finish
):
    """Takes the steps of a chunk from the last to the first through their stages; a step is prepared before the one
    ahead of it, as in `for_each_step`, and a register finished when the products of its last step are long there: the
    last of a trip when the next has begun, the one before it with the last step of the trip.
    """
    count, parts = spec.chunk // STEP, spec.parts(spec.matrix_width)
    unrolled, registers, ahead = spec.unrolled, _registers(spec), _parts_ahead(spec)

    def at(trip, place):
        # After the last comes the first again, and before the first the last, for nothing.
        index = count - 1 - (unrolled * trip + place + count) % count
        lane = lane_of(-1 - place if spec.whole_registers else index)
        return step_of(spec, index, place, lane)

    def register(place):
        return place // STEPS_OF_A_REGISTER

    def trip(i, _):
        waiting = []

        def left_at(number, part):
            if factors is None:
                return None, [None] * STEP
            # Where one trip leaves it and where the next is known only at run time: what is left where the compiler
            # knows, it takes for registers, and spills.
            at = i & 1, number % (ahead + 1), ..., slice(0, part.stop - part.start)
            return decays.at[at], factors.at[at]

        def back(place, part, left, found):
            now = at(i, place)
            found.append(add_up(now, part, *way_back(now, part, left)))
            if len(found) == len(parts):
                write(now, register(place), *zip(*found, strict=True))

        for place in range(unrolled):
            now = at(i, place)
            turn(at(i, place + 1))
            found, to_C = [], 0
            for number, part in enumerate(parts, len(parts) * place):
                if len(waiting) == ahead:
                    back(*waiting.pop(0))
                left = left_at(number, part)
                to_C += way_out(now, part, left)
                waiting.append((place, part, left, found))
            if place == 0:
                # Before the first of its rows is of this trip.
                finish(at(i, -1), registers - 1)
            elif place == unrolled - 1 and registers > 1:
                finish(at(i, STEPS_OF_A_REGISTER - 1), 0)
            write_tiles(own_C, register(place), of_own(to_C, STEP), now.lanes)
            prepare(at(i, place + 1))
        for part in waiting:
            back(*part)

    prepare(at(0, 0))
    turn(at(0, 0))
    jax.lax.fori_loop(0, count // unrolled, trip, None)
    finish(at(0, -1), registers - 1)


def _steps_of_a_trip(spec: Spec) -> int:
    """Steps in a trip, of which a chunk has at least two if it has several registers of channels: of a loop that is
    none the compiler knows all places, and what ways out leave is in registers, and spilled.
    """
    few_parts = len(spec.parts(spec.matrix_width)) <= MOST_PARTS_OF_MOST_STEPS
    steps = min(spec.unrolled, MOST_STEPS if few_parts else MOST_STEPS // 2)
    is_all = steps == spec.chunk // STEP and spec.channels > LANES
    return steps // 2 if is_all else steps


def _registers(spec: Spec) -> int:
    """Registers that have the columns of a trip."""
    return max(1, spec.unrolled // STEPS_OF_A_REGISTER)


def _parts_ahead(spec: Spec) -> int:
    """Parts whose way out comes before the way back of the first of them."""
    return PARTS_AHEAD if len(spec.parts(spec.matrix_width)) > 1 else 1
