"""The backward of the selective scan on TPU: chunk after chunk from the last to the first, tokens likewise.

With g_t the adjoint of h_t, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, every gradient is a sum of products of g_t with
what the token t had: over states for u and Δ, over channels for B and C, over tokens for A.

The gradients of Δ and A through the decay have the same terms but for a factor, A and Δ. Both times its own factor sums
p_t = g_{t+1} exp(Δ_{t+1} A) h_t Δ_{t+1} A, over states or over tokens: one stack for the matrix unit, of which the sums
are divided, so that Δ and A may not be 0 (`_away_from_0`, `_step`).

On the way to the last token of a chunk the states are computed again, and of each something is left in VMEM for the way
back. Where vector units multiply bfloat16 and store two registers a cycle (`Spec.narrow`), that is the decay, which is
not computed a third time, and exp(Δ_t A) h_{t-1} Δ_t A in bfloat16, so that p is one product of what the matrix unit
takes anyway. There the sums over channels for B begin in the vector unit: a matrix unit takes the adjoints for them
transposed, at half its pace, and without them it has less to do than the vector unit. Elsewhere it is the state.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.tpu_blocks import LANES
from pallas_kernels.selective_scan.tpu_tile import (
    LAST,
    LOG2_E,
    STEP,
    VMEM_LIMIT,
    Blocks,
    Spec,
    by_state,
    columns,
    columns_of_steps,
    decay,
    dot,
    for_each_step,
    in_columns,
    in_lanes,
    of_own,
    row,
    rows_of_steps,
    stack,
    step_tokens,
    sums,
    widened,
)
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import shaped_like

# JAX 0.11 has it elsewhere.
_reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal
# What stands for steps and rates nearer to 0: the decay is 1 in float32 all the same, and their product is far from
# the least float32.
LEAST_STEP = 1.001 * 2.0**-60
LEAST_RATE = 2.0**-30


def backward(spec: Spec, saved, cotangents):
    u, delta, A, B, C, D, z, resets, pasts = saved
    d_y, d_last = cotangents
    (batch, time, channels), states = u.shape, A.shape[0]
    chunks, channel_blocks = time // spec.chunk, channels // spec.channels
    blocks = Blocks(spec, states, lambda c: chunks - 1 - c)
    skips, gates = D is not None, z is not None
    outputs = {
        "u": (shaped_like(u, u.shape, u.dtype), blocks.tokens),
        "delta": (shaped_like(u, u.shape, delta.dtype), blocks.tokens),
        "A": (shaped_like(u, (batch, states, channels), jnp.float32), blocks.state),
        "B": (
            shaped_like(u, (batch, channel_blocks, time, states), jnp.float32),
            blocks.partial_rows,
        ),
        "C": (
            shaped_like(u, (batch, channel_blocks, time, states), jnp.float32),
            blocks.partial_rows,
        ),
        "D": (shaped_like(u, (batch, 1, channels), jnp.float32), blocks.state_row)
        if skips
        else (None, None),
        "z": (shaped_like(u, u.shape, u.dtype), blocks.tokens) if gates else (None, None),
        "state": (shaped_like(u, (batch, states, channels), jnp.float32), blocks.state),
    }
    gradients = tpu_call(
        functools.partial(_kernel, spec),
        grid=(batch, channel_blocks, chunks),
        in_specs=(
            blocks.tokens,
            blocks.tokens,
            blocks.per_channel,
            blocks.columns,
            blocks.columns,
            blocks.rows,
            blocks.rows,
            blocks.channel_row if skips else None,
            blocks.tokens if gates else None,
            None if resets is None else blocks.resets,
            blocks.pasts,
            blocks.tokens,
            blocks.state,
        ),
        out_specs=tuple(block for _, block in outputs.values()),
        out_shape=tuple(shape for shape, _ in outputs.values()),
        scratch_shapes=(
            *rows_of_steps(spec, 2),
            *_rows_for_the_way_back(spec),
            columns_of_steps(states),
            pltpu.VMEM((states, spec.channels), jnp.float32),
            *_states_of_chunk(spec, states),
            pltpu.VMEM((2, STEP, STEP * states), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=spec.interpret,
        name="selective_scan_backward",
    )(u, delta, A, in_columns(B), in_columns(C), B, C, D, z, resets, pasts, d_y, d_last)
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_state = gradients
    d_A = d_A.sum(axis=0) / (LOG2_E * _away_from_0(A, LEAST_RATE))
    d_D = None if d_D is None else d_D.sum(axis=0)
    d_B, d_C = (x.sum(axis=1).astype(u.dtype) for x in (d_B, d_C))
    return d_u, d_delta, d_A, d_B, d_C, d_D, d_z, None, d_state


def _rows_for_the_way_back(spec: Spec):
    """Scratch for Δ, Δ u and the gradients of what is read: where `spec.narrow` of the chunk, else of both slots, and
    Δ u is not wanted.
    """
    if not spec.narrow:
        steps, d_reads = rows_of_steps(spec, 2)
        return steps, None, d_reads
    shape = (spec.chunk // STEP, STEP, spec.channels)
    return tuple(pltpu.VMEM(shape, dtype) for dtype in (jnp.float32, jnp.uint32, jnp.float32))


def _states_of_chunk(spec: Spec, states: int):
    """Scratch for `factors` and `decays` of `_kernel`."""
    shape = (spec.chunk, states, spec.channels)
    if spec.narrow:
        return pltpu.VMEM(shape, jnp.bfloat16), pltpu.VMEM(shape, jnp.float32)
    return pltpu.VMEM(shape, jnp.float32), None


def _kernel(
    spec, u, delta, A, B_columns, C_columns, B, C, D, z, resets, past, d_y, d_last,
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, adjoint,
    step_rows, input_rows, steps, inputs, d_reads, spread, state, factors, decays, products,
):  # fmt: skip
    """One chunk of one block of channels. The gradient of the first state holds the adjoint from chunk to chunk.

    Scratch: rows of the steps in both slots, Δ and Δ u; those for the way back; of the steps in both slots the columns
    that are wanted, spread over lanes; the present state; of each token of the chunk `factors`, with which the adjoint
    is multiplied, and `decays`; of both slots products over channels.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        adjoint[...] = d_last[...]
        d_A[...] = jnp.zeros_like(d_A)
        if d_D is not None:
            d_D[...] = jnp.zeros_like(d_D)

    base2_A = _away_from_0(A[...], LEAST_RATE) * LOG2_E
    state[...] = past[...]
    _walk(
        spec, u, delta, base2_A, B_columns, C, D, z, resets, d_y, d_C, d_D, d_z,
        step_rows, input_rows, steps, inputs, d_reads, spread, state, factors, decays, products,
    )  # fmt: skip
    _walk_back(
        spec, u, base2_A, C_columns, B, D, resets, d_u, d_delta, d_A, d_B, adjoint,
        delta, z, d_y, steps, inputs, d_reads, spread, factors, decays, products,
    )  # fmt: skip


def _walk(
    spec, u, delta, base2_A, B_columns, C, D, z, resets, d_y, d_C, d_D, d_z,
    step_rows, input_rows, steps, inputs, d_reads, to_state, state, factors, decays, products,
):  # fmt: skip
    """The states of the chunk, and with each step's at hand the gradients of C, D and z."""
    dtype, rounded = u.dtype, u.dtype == jnp.bfloat16

    def prepare(index, slot):
        tokens = step_tokens(index)
        step = _step(delta[tokens])
        taken = step * _wide(u[tokens])
        step_rows[slot], input_rows[slot] = step, taken
        if spec.narrow:
            # Not read here: loads of rows whose number is not known would wait for stores to such.
            steps[index], inputs[index] = step, _twice_in_bfloat16(taken)
        to_state[slot] = columns(B_columns, index)

    def advance(index, slot):
        tokens, to_C = step_tokens(index), 0
        for part in spec.parts(spec.matrix_width):
            h, passed = state[:, part], []
            for t in range(STEP):
                at = STEP * index + t
                exponent = row(step_rows, slot, t, part) * base2_A[:, part]
                kept = decay(exponent, resets, at)
                if not spec.narrow:
                    factors[at, :, part] = h
                h = kept * h
                if spec.narrow:
                    decays[at, :, part] = kept
                    factors[at, :, part] = (h * exponent).astype(dtype)
                h += row(input_rows, slot, t, part) * widened(to_state[slot, t], part)
                passed.append(h)
            state[:, part] = h
            passed = stack(passed)
            d_read = _wide(d_y[tokens, part])
            if z is not None:
                ungated = dot(by_state(C[tokens]), passed, rounded=rounded)
                if D is not None:
                    ungated += D[:, part] * _wide(u[tokens, part])
                gate = _wide(z[tokens, part])
                half = jax.nn.sigmoid(gate)
                d_gate = d_read * ungated * half * (1 + gate * (1 - half))
                d_z[tokens, part] = d_gate.astype(d_z.dtype)
                d_read *= gate * half
            if D is not None:
                d_skip = d_read * _wide(u[tokens, part])
                d_D[:, part] += jnp.sum(d_skip, axis=0, keepdims=True)
            if spec.narrow:
                d_reads[index, :, part] = d_read
            to_C += dot(d_read, passed, LAST, rounded=rounded)
        products[slot] = to_C

    def finish(index, slot):
        d_C[step_tokens(index)] = of_own(products[slot], dtype)

    for_each_step(spec, prepare, advance, finish)


def _walk_back(
    spec, u, base2_A, C_columns, B, D, resets, d_u, d_delta, d_A, d_B, adjoint,
    delta, z, d_y, steps, inputs, d_reads, from_state, factors, decays, products,
):  # fmt: skip
    """The adjoints of the chunk's states, and the gradients that are sums of them."""
    dtype, rounded, num_states = u.dtype, u.dtype == jnp.bfloat16, B.shape[1]

    def prepare(index, slot):
        if not spec.narrow:
            tokens = step_tokens(index)
            steps[slot] = _step(delta[tokens])
            d_read = _wide(d_y[tokens])
            d_reads[slot] = d_read if z is None else d_read * jax.nn.silu(_wide(z[tokens]))
        from_state[slot] = columns(C_columns, index)

    def advance(index, slot):
        tokens, rows = step_tokens(index), index if spec.narrow else slot
        to_B, over_lanes = 0, [0] * STEP
        writing = by_state(B[tokens], reverse=True)
        for_decay = sums(num_states, reverse=True).astype(jnp.float32)
        for part in _parts_back(spec):
            g, passed, by_exponents = adjoint[:, part], [], []
            for i, t in enumerate(reversed(range(STEP))):
                at = STEP * index + t
                g += widened(from_state[slot, t], part) * row(d_reads, rows, t, part)
                if spec.narrow:
                    passed.append(g.astype(dtype))
                    by_exponents.append(passed[i] * factors[at, :, part])
                    written = passed[i] * _in_bfloat16(row(inputs, rows, t, part), num_states)
                    over_lanes[i] += in_lanes(written)
                    g *= decays[at, :, part]
                else:
                    passed.append(g)
                    exponent = row(steps, rows, t, part) * base2_A[:, part]
                    g *= decay(exponent, resets, at)
                    by_exponents.append(g * factors[at, :, part] * exponent)
            adjoint[:, part] = g
            # The adjoints go into two products and are converted once; the others are rounded by the matrix unit.
            passed, by_exponents = stack(passed).astype(dtype), stack(by_exponents)
            step, wide_u = steps[rows, :, part], _wide(u[tokens, part])
            both = dot(for_decay, by_exponents, rounded=rounded)
            if not spec.narrow:
                to_B += dot((step * wide_u).astype(dtype), passed, LAST)
            d_write = dot(writing, passed)
            to_u = d_write * step
            if D is not None:
                to_u += D[:, part] * d_reads[rows, :, part]
            d_u[tokens, part] = to_u.astype(d_u.dtype)
            d_A[:, part] += both[STEP:]
            inverse = _inverse_in_base_2(step, rounded=rounded)
            to_delta = both[:STEP] * inverse + d_write * wide_u
            d_delta[tokens, part] = to_delta.astype(d_delta.dtype)
        if spec.narrow:
            to_B = dot(jnp.ones((STEP, LANES), dtype), stack(over_lanes), LAST)
        products[slot] = to_B

    def finish(index, slot):
        d_B[step_tokens(index)] = of_own(products[slot], dtype, reverse=True)

    for_each_step(spec, prepare, advance, finish, reverse=True)


def _parts_back(spec: Spec) -> list[slice]:
    """Parts of a block on the way back, by the schedules for v6e and v5e.

    The wider they are, the more registers wait for the matrix unit, and the fewer sums over lanes there are.
    """
    return spec.parts(4 * LANES if spec.narrow else spec.matrix_width)


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


def _inverse_in_base_2(x, *, rounded: bool):
    """ln 2 / x; `rounded`: as the unit for transcendental functions has it.

    That is of more digits than bfloat16: where a division is of float32, the compiler takes one of Newton's steps from
    there, or none.
    """
    return _reciprocal(x, approx=True) / LOG2_E if rounded else 1 / (LOG2_E * x)


def _wide(x):
    return x.astype(jnp.float32)
