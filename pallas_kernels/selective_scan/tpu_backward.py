"""The backward of the selective scan on TPU: chunk after chunk from the last to the first, tokens likewise.

With g_t the adjoint of h_t, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, every gradient is a sum of products of g_t with
what the token t had: over states for u and Δ, over channels for B and C, over tokens for A.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.tpu_tile import (
    LOG2_E,
    SUBLANES,
    VMEM_LIMIT,
    Blocks,
    Spec,
    StateSums,
    add_lane_groups,
    columns,
    decay,
    for_each_register,
    row,
    set_columns,
)
from pallas_kernels.varying import shaped_like


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
            shaped_like(u, (batch, channel_blocks, states, time), jnp.float32),
            blocks.partial_columns,
        ),
        "C": (
            shaped_like(u, (batch, channel_blocks, states, time), jnp.float32),
            blocks.partial_columns,
        ),
        "D": (shaped_like(u, (batch, 1, channels), jnp.float32), blocks.state_row)
        if skips
        else (None, None),
        "z": (shaped_like(u, u.shape, u.dtype), blocks.tokens) if gates else (None, None),
        "state": (shaped_like(u, (batch, states, channels), jnp.float32), blocks.state),
    }
    rows = pltpu.VMEM((spec.chunk, spec.channels), jnp.float32)
    sums = StateSums.scratch(spec)
    chunk_of_states = pltpu.VMEM((spec.chunk + 1, states, spec.channels), jnp.float32)
    gradients = pl.pallas_call(
        functools.partial(_kernel, spec),
        grid=(batch, channel_blocks, chunks),
        in_specs=(
            blocks.tokens,
            blocks.tokens,
            blocks.per_channel,
            blocks.columns,
            blocks.columns,
            blocks.channel_row if skips else None,
            blocks.tokens if gates else None,
            None if resets is None else blocks.resets,
            blocks.pasts,
            blocks.tokens,
            blocks.state,
        ),
        out_specs=tuple(block for _, block in outputs.values()),
        out_shape=tuple(shape for shape, _ in outputs.values()),
        scratch_shapes=(rows, rows, rows, sums, sums, chunk_of_states),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=spec.interpret,
        name="selective_scan_backward",
    )(u, delta, A, B, C, D, z, resets, pasts, d_y, d_last)
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_state = gradients
    d_D = None if d_D is None else d_D.sum(axis=0)
    return d_u, d_delta, d_A.sum(axis=0), d_B.sum(axis=1), d_C.sum(axis=1), d_D, d_z, None, d_state


def _kernel(
    spec, u, delta, A, B, C, D, z, resets, past, d_y, d_last,
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, adjoint,
    steps, inputs, d_reads, sums, more_sums, states,
):  # fmt: skip
    """One chunk of one block of channels. The gradient of the first state holds the adjoint from chunk to chunk."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        adjoint[...] = d_last[...]
        d_A[...] = jnp.zeros_like(d_A)
        if d_D is not None:
            d_D[...] = jnp.zeros_like(d_D)

    base2_A = A[...] * LOG2_E
    d_exponents, d_writes = StateSums(sums), StateSums(more_sums)
    steps[...] = delta[...].astype(jnp.float32)
    inputs[...] = steps[...] * u[...].astype(jnp.float32)
    reads = None if z is None else StateSums(sums)
    _states(spec, base2_A, B, C, resets, past, steps, inputs, states, reads)
    d_reads[...] = _through_skip_and_gate(u, D, z, reads, d_y, d_D, d_z)
    _walk_back(
        spec, base2_A, B, C, resets, steps, inputs, states, d_reads,
        d_A, d_B, d_C, adjoint, d_exponents, d_writes,
    )  # fmt: skip
    d_write = d_writes.total()
    to_u = d_write * steps[...]
    if D is not None:
        to_u += D[...] * d_reads[...]
    d_u[...] = to_u.astype(d_u.dtype)
    to_delta = d_exponents.total() / LOG2_E + d_write * u[...].astype(jnp.float32)
    d_delta[...] = to_delta.astype(d_delta.dtype)


def _states(spec, base2_A, B, C, resets, past, steps, inputs, states, reads):
    """The states before and after each token of the chunk and, unless `reads` is None, C h of each."""

    def tokens(start):
        to_state = columns(B, start, spec.part)
        from_state = None if reads is None else columns(C, start, spec.part)
        for part in spec.parts:
            h = states[start, :, part]
            for j in range(SUBLANES):
                t = start + j
                kept = decay(row(steps, t, part), base2_A[:, part], resets, t)
                h = kept * h + row(inputs, t, part) * to_state[j]
                states[t + 1, :, part] = h
                if reads is not None:
                    reads.put(t, part, h * from_state[j])

    states[0] = past[...]
    for_each_register(tokens)


def _through_skip_and_gate(u, D, z, reads, d_y, d_D, d_z):
    """The gradient of C h from that of y, and with it those of D and z."""
    d_reads = d_y[...].astype(jnp.float32)
    wide_u = u[...].astype(jnp.float32)
    if z is not None:
        gate = z[...].astype(jnp.float32)
        half = jax.nn.sigmoid(gate)
        ungated = reads.total()
        if D is not None:
            ungated += D[...] * wide_u
        d_z[...] = (d_reads * ungated * half * (1 + gate * (1 - half))).astype(d_z.dtype)
        d_reads *= gate * half
    if D is not None:
        d_D[...] += jnp.sum(d_reads * wide_u, axis=0, keepdims=True)
    return d_reads


def _walk_back(
    spec, base2_A, B, C, resets, steps, inputs, states, d_reads,
    d_A, d_B, d_C, adjoint, d_exponents, d_writes,
):  # fmt: skip
    """The adjoints of the chunk's states, and their sums.

    `d_exponents` receives what Δ gets through the decay, times 1 / ln 2, and `d_writes` what Δ u gets.
    """
    d_B[...], d_C[...] = jnp.zeros_like(d_B), jnp.zeros_like(d_C)

    def sums_over_channels(start):
        sums = [jnp.zeros(d_C.shape, jnp.float32)] * SUBLANES
        for part in spec.parts:
            for j in range(SUBLANES):
                t = start + j
                sums[j] += add_lane_groups(states[t + 1, :, part] * row(d_reads, t, part))
        set_columns(d_C, start, sums)

    for_each_register(sums_over_channels)

    def tokens(start):
        to_state, from_state = (columns(x, start, spec.part) for x in (B, C))
        to_B = [jnp.zeros(d_B.shape, jnp.float32)] * SUBLANES
        for part in spec.parts:
            g, to_A = adjoint[:, part], d_A[:, part]
            for j in reversed(range(SUBLANES)):
                t = start + j
                step = row(steps, t, part)
                g += from_state[j] * row(d_reads, t, part)
                to_B[j] += add_lane_groups(g * row(inputs, t, part))
                d_writes.put(t, part, g * to_state[j])
                g *= decay(step, base2_A[:, part], resets, t)
                d_exponent = g * states[t, :, part]
                d_exponents.put(t, part, d_exponent * base2_A[:, part])
                to_A += d_exponent * step
            adjoint[:, part], d_A[:, part] = g, to_A
        set_columns(d_B, start, to_B)

    for_each_register(tokens, reverse=True)
