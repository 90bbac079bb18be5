"""The stages of a step in the backward of the selective scan on TPU.

With g_t the adjoint of h_t, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, every gradient is a sum of products of g_t with
what the token t had: over states for u and Δ, over channels for B and C, over tokens for A.

The gradients of Δ and A through the decay have the same terms but for a factor, A and Δ. Both times its own factor sums
p_t = g_t exp(Δ_t A) h_{t-1} Δ_t A, over states or over tokens: one stack for the matrix unit, of which the sums are
divided, so that Δ and A may not be 0 (`away_from_0`, `positive`).

A token leaves for the way back its decay exp(Δ_t A), which is not computed again, and what p_t is g_t times; or else
only the state before it. Where vector units multiply bfloat16 and store two registers a cycle (`Spec.narrow`), all
leave both, the factor in bfloat16: p is one product of what the matrix unit takes anyway. There the sums over channels
for B begin in the vector unit where a block has several parts: a matrix unit takes the adjoints for them transposed, at
half its pace, but once for all of the parts. Elsewhere one of `TOKENS_A_DECAY` leaves both.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.tpu_blocks import LANES
from pallas_kernels.selective_scan.tpu_columns import widened
from pallas_kernels.selective_scan.tpu_tile import (
    LAST,
    LOG2_E,
    ROWS_OF_A_TILE,
    STEP,
    Spec,
    decay,
    dot,
    in_lanes,
    over_states,
    read_tiles,
    row,
    stack,
    stacks,
    sums,
    tiles,
)

# JAX 0.11 has it elsewhere.
_reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal
# What stands for steps and rates nearer to 0: the decay is 1 in float32 all the same, and their product is far from
# the least float32.
LEAST_STEP = 1.001 * 2.0**-60
LEAST_RATE = 2.0**-30
# Where the vector unit takes no bfloat16, one of so many tokens leaves its decay, which for others is computed again:
# with more of them the one store a cycle binds on v5e, with fewer the vector unit.
TOKENS_A_DECAY = 2


def _tokens_a_decay(spec: Spec) -> int:
    """Of how many tokens one leaves its decay for the way back, if any does."""
    return 1 if spec.narrow else TOKENS_A_DECAY


def _place_of_decay(spec: Spec, decays, t: int) -> int | None:
    """Where among `decays` token t of a step leaves its own, or None."""
    every = _tokens_a_decay(spec)
    return None if decays is None or t % every else t // every


def left_of_parts(spec: Spec, count: int, states: int, dtype):
    """Scratch for what `way_out` leaves, decays and factors, of so many parts in each of two trips; None in float32."""
    if dtype == jnp.float32:
        return None, None
    part = states, min(spec.matrix_width, spec.channels)
    return (
        pltpu.VMEM((2, count, STEP // _tokens_a_decay(spec), *part), jnp.float32),
        pltpu.VMEM((2, count, STEP, *part), dtype if spec.narrow else jnp.float32),
    )


def way_out(
    spec, u, base2_A, reading, D, z, resets, past, d_y, d_z,
    steps, inputs, d_reads, to_state, at, part, left,
):  # fmt: skip
    """The states of a part in a step, and with them the gradient of z.

    Args:
        at, part: the step and the channels.
        left: where to leave for the way back the decays of some tokens, or None, and of each what p is a multiple of
            where its decay is left, or else the state before it.

    Returns:
        The products over channels for the gradient of C.
    """
    tokens, rounded, (decays, factors) = at.tokens, u.dtype == jnp.bfloat16, left
    h, passed = past[at.index, :, part].astype(jnp.float32), []
    for t in range(STEP):
        exponent = row(steps, at, t, part) * base2_A[:, part]
        kept = decay(exponent, resets, at, t)
        before, h = h, kept * h
        place = _place_of_decay(spec, decays, t)
        if place is None:
            factors[t] = before
        else:
            decays[place], factors[t] = kept, (h * exponent).astype(factors.dtype)
        h += row(inputs, at, t, part) * widened(to_state[at.slot, t], part)
        passed.append(h)
    if z is not None:
        ungated = over_states(reading, at, passed, rounded=rounded)
        if D is not None:
            ungated += D[:, part] * u[tokens, part].astype(jnp.float32)
        gate = z[tokens, part].astype(jnp.float32)
        half = jax.nn.sigmoid(gate)
        d_gate = d_y[tokens, part].astype(jnp.float32) * ungated * half * (1 + gate * (1 - half))
        d_z[tokens, part] = d_gate.astype(d_z.dtype)
    return dot(d_reads[at.slot, :, part], stack(passed), LAST, rounded=rounded)


def way_back(
    spec, dtype, base2_A, resets, adjoint, steps, d_reads, narrow_inputs, from_state, at, part, left,
):  # fmt: skip
    """The adjoints of a part's states in a step.

    Args:
        at, part: the step and the channels.
        left: what `way_out` left.

    Returns:
        Of each token, the last first: the adjoint, p, and the products with Δ u where `Spec.sums_lanes`.
    """
    num_states, (decays, factors) = base2_A.shape[0], left
    g, passed, by_exponents, written = adjoint[:, part], [], [], []
    for t in reversed(range(STEP)):
        g += widened(from_state[at.slot, t], part) * row(d_reads, at, t, part)
        passed.append(g.astype(dtype) if spec.narrow else g)
        if spec.sums_lanes:
            taken = _in_bfloat16(row(narrow_inputs, at, t, part), num_states)
            written.append(in_lanes(passed[-1] * taken))
        place = _place_of_decay(spec, decays, t)
        if place is None:
            exponent = row(steps, at, t, part) * base2_A[:, part]
            g *= decay(exponent, resets, at, t)
            by_exponents.append(g * factors[t] * exponent)
        else:
            by_exponents.append(passed[-1] * factors[t])
            g *= decays[place]
    adjoint[:, part] = g
    return passed, by_exponents, written


def add_up(
    spec, u, D, d_D, steps, inputs, d_reads, writing, at, part, passed, by_exponents, written,
):  # fmt: skip
    """The gradients that are sums of what `way_back` returns, of a part in a step.

    Returns:
        What `over_channels` takes; in float32 the gradients of u and Δ [STEP, part], and that of A [N, part] times A.
    """
    dtype, rounded, num_states = u.dtype, u.dtype == jnp.bfloat16, passed[0].shape[0]
    step, taken = steps[at.slot, :, part], inputs[at.slot, :, part]

    def for_decay_and_rates():
        group = spec.group(num_states)
        for_decay = sums(num_states, group, reverse=True)
        # The last tokens come first.
        of_groups = [dot(for_decay, x, rounded=rounded) for x in stacks(by_exponents, group)][::-1]
        to_exponents = jnp.concatenate([x[:group] for x in of_groups], axis=0)
        return to_exponents, sum(x[group:] for x in of_groups)

    def for_B():
        if spec.sums_lanes:
            return stack(written)
        of_tiles = [x.astype(dtype) for x in tiles(passed, ROWS_OF_A_TILE)]
        return jnp.concatenate([dot(taken.astype(dtype), x, LAST) for x in of_tiles], axis=1)

    # Products keep their order. On a wide matrix unit that of a tile begins before all of the stack is there, and that
    # of the whole stack does not.
    if spec.narrow:
        to_B, (to_exponents, to_rates) = for_B(), for_decay_and_rates()
    else:
        (to_exponents, to_rates), to_B = for_decay_and_rates(), for_B()
    rows, d_write, first = read_tiles(writing, at.slot), 0, 0
    for adjoints in tiles(passed, spec.matrix_width):
        last = first + len(adjoints)
        d_write += dot(rows[:, first:last], adjoints.astype(dtype))
        first = last
    to_u = d_write * step
    if D is not None:
        d_read = d_reads[at.slot, :, part]
        to_u += D[:, part] * d_read
        d_skip = d_read * u[at.tokens, part].astype(jnp.float32)
        d_D[:, part] += jnp.sum(d_skip, axis=0, keepdims=True)
    to_delta = (to_exponents * (1 / LOG2_E) + d_write * taken) * _inverse(step, rounded=rounded)
    return to_B, to_u, to_delta, to_rates


def over_channels(spec: Spec, to_B, dtype):
    """Products over channels for the gradient of B, of the sum of what `add_up` gives for the parts of a block."""
    return dot(jnp.ones((STEP, LANES), dtype), to_B, LAST) if spec.sums_lanes else to_B


def positive(delta):
    """Δ in float32, but for 0: the constant is lost in all steps but the least, and no bfloat16."""
    if delta.dtype == jnp.float32:
        return away_from_0(delta, LEAST_STEP)
    return delta.astype(jnp.float32) + LEAST_STEP


def twice_in_bfloat16(x):
    """Float32 -> uint32, both halves of which are the number in bfloat16: a row of it spreads over a state in it."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
    return bits | (bits >> 16)


def _in_bfloat16(twice, states: int):
    """Such a row [1, part] -> bfloat16 [states, part]."""
    return pltpu.bitcast(jnp.broadcast_to(twice, (states // 2, twice.shape[1])), jnp.bfloat16)


def away_from_0(x, least: float):
    return jnp.where(jnp.abs(x) < least, least, x)


def _inverse(x, *, rounded: bool):
    """1 / x; `rounded`: as the unit for transcendental functions has it.

    That is of more digits than bfloat16: where a division is of float32, the compiler takes one of Newton's steps from
    there, or none.
    """
    return _reciprocal(x, approx=True) if rounded else 1 / x
