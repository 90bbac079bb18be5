"""The backward of the selective scan on TPU: chunk after chunk from the last to the first, tokens likewise.

With g_t the adjoint of h_t, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, every gradient is a sum of products of g_t with
what the token t had: over states for u and Δ, over channels for B and C, over tokens for A.

The gradients of Δ and A through the decay have the same terms but for a factor, A and Δ. Both times its own factor sums
p_t = g_{t+1} exp(Δ_{t+1} A) h_t Δ_{t+1} A, over states or over tokens: one stack for the matrix unit, of which the sums
are divided, so that Δ and A may not be 0 (`_away_from_0`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
LEAST_STEP = 2.0**-60
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
    chunk_of_states = pltpu.VMEM((spec.chunk + 1, states, spec.channels), jnp.float32)
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
            columns_of_steps(states),
            chunk_of_states,
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


def _kernel(
    spec, u, delta, A, B_columns, C_columns, B, C, D, z, resets, past, d_y, d_last,
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, adjoint,
    steps, others, spread, states, products,
):  # fmt: skip
    """One chunk of one block of channels. The gradient of the first state holds the adjoint from chunk to chunk.

    Scratch: of the steps in both slots Δ, what else there is of each token, and the columns that are wanted, spread
    over lanes; the states before and after each token of the chunk; of both slots products over channels.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        adjoint[...] = d_last[...]
        d_A[...] = jnp.zeros_like(d_A)
        if d_D is not None:
            d_D[...] = jnp.zeros_like(d_D)

    base2_A = _away_from_0(A[...], LEAST_RATE) * LOG2_E
    states[0] = past[...]
    _walk(
        spec, u, delta, base2_A, B_columns, C, D, z, resets, d_y, d_C, d_D, d_z,
        steps, others, spread, states, products,
    )  # fmt: skip
    _walk_back(
        spec, u, delta, base2_A, C_columns, B, D, z, resets, d_y, d_u, d_delta, d_A, d_B, adjoint,
        steps, others, spread, states, products,
    )  # fmt: skip


def _walk(
    spec, u, delta, base2_A, B_columns, C, D, z, resets, d_y, d_C, d_D, d_z,
    steps, inputs, to_state, states, products,
):  # fmt: skip
    """The states of the chunk, and with each step's at hand the gradients of C, D and z."""
    dtype, rounded = u.dtype, u.dtype == jnp.bfloat16

    def prepare(index, slot):
        tokens = step_tokens(index)
        steps[slot] = _wide(delta[tokens])
        inputs[slot] = steps[slot] * _wide(u[tokens])
        to_state[slot] = columns(B_columns, index)

    def advance(index, slot):
        tokens, to_C = step_tokens(index), 0
        for part in spec.parts():
            h, passed = states[STEP * index, :, part], []
            for t in range(STEP):
                kept = decay(row(steps, slot, t, part) * base2_A[:, part], resets, STEP * index + t)
                h = kept * h + row(inputs, slot, t, part) * widened(to_state[slot, t], part)
                states[STEP * index + t + 1, :, part] = h
                passed.append(h)
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
            to_C += dot(d_read, passed, LAST, rounded=rounded)
        products[slot] = to_C

    def finish(index, slot):
        d_C[step_tokens(index)] = of_own(products[slot], dtype)

    for_each_step(spec, prepare, advance, finish)


def _walk_back(
    spec, u, delta, base2_A, C_columns, B, D, z, resets, d_y, d_u, d_delta, d_A, d_B, adjoint,
    steps, d_reads, from_state, states, products,
):  # fmt: skip
    """The adjoints of the chunk's states, and the gradients that are sums of them."""
    dtype, rounded, num_states = u.dtype, u.dtype == jnp.bfloat16, B.shape[1]

    def prepare(index, slot):
        tokens = step_tokens(index)
        steps[slot] = _away_from_0(_wide(delta[tokens]), LEAST_STEP)
        d_read = _wide(d_y[tokens])
        d_reads[slot] = d_read if z is None else d_read * jax.nn.silu(_wide(z[tokens]))
        from_state[slot] = columns(C_columns, index)

    def advance(index, slot):
        tokens, to_B = step_tokens(index), 0
        writing = by_state(B[tokens], reverse=True)
        for_decay = sums(num_states, reverse=True).astype(jnp.float32)
        # Three products take their tiles at once: each part is one tile wide, so that few are on their way together. Of
        # all orders this one spills least.
        for part in spec.parts(spec.matrix_width):
            g, passed, by_exponents = adjoint[:, part], [], []
            for t in reversed(range(STEP)):
                g += widened(from_state[slot, t], part) * row(d_reads, slot, t, part)
                passed.append(g)
                exponent = row(steps, slot, t, part) * base2_A[:, part]
                g *= decay(exponent, resets, STEP * index + t)
                by_exponents.append(g * states[STEP * index + t, :, part] * exponent)
            adjoint[:, part] = g
            # The adjoints go into two products and are converted once; the others are rounded by the matrix unit.
            passed, by_exponents = stack(passed).astype(dtype), stack(by_exponents)
            step, wide_u = steps[slot, :, part], _wide(u[tokens, part])
            both = dot(for_decay, by_exponents, rounded=rounded)
            to_B += dot((step * wide_u).astype(dtype), passed, LAST)
            d_write = dot(writing, passed)
            to_u = d_write * step
            if D is not None:
                to_u += D[:, part] * d_reads[slot, :, part]
            d_u[tokens, part] = to_u.astype(d_u.dtype)
            d_A[:, part] += both[STEP:]
            inverse = _inverse_in_base_2(step, rounded=rounded)
            to_delta = both[:STEP] * inverse + d_write * wide_u
            d_delta[tokens, part] = to_delta.astype(d_delta.dtype)
        products[slot] = to_B

    def finish(index, slot):
        d_B[step_tokens(index)] = of_own(products[slot], dtype, reverse=True)

    for_each_step(spec, prepare, advance, finish, reverse=True)


def _away_from_0(x, least: float):
    return jnp.where(jnp.abs(x) < least, least, x)


def _inverse_in_base_2(x, *, rounded: bool):
    """ln 2 / x; `rounded`: to more than bfloat16, by one of Newton's steps, at less than the cost of a division."""
    if not rounded:
        return 1 / (LOG2_E * x)
    guess = _reciprocal(x, approx=True)
    return guess * ((2 - x * guess) / LOG2_E)


def _wide(x):
    return x.astype(jnp.float32)
