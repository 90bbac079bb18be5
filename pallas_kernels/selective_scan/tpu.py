"""The selective scan on TPU (Pallas, Mosaic): the state stays in VMEM from the first token of a row to the last.

Gu and Dao, arXiv 2312.00752, section 3.3.2: states never reach HBM, but for the one before each step of 16 tokens, in
the dtype of u, from which the backward (`tpu_backward`) computes the others again: at 16 states a channel they are as
large as u. Skip and gate are applied in the kernel, where their memory traffic is free.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import has_bfloat16_vectors, matrix_width
from pallas_kernels.cotangents import values
from pallas_kernels.dispatch import target
from pallas_kernels.residuals import keep
from pallas_kernels.selective_scan import tpu_backward
from pallas_kernels.selective_scan.tpu_blocks import (
    LANES,
    block_channels,
    chunk_tokens,
    unrolled_steps,
)
from pallas_kernels.selective_scan.tpu_columns import (
    all_in_rows,
    columns,
    columns_dtype,
    columns_of_steps,
    in_rows,
    rows_of_tokens,
    wide_tokens,
    widened,
)
from pallas_kernels.selective_scan.tpu_tile import (
    LEAST_STEPS,
    LOG2_E,
    STEP,
    SUBLANES,
    VMEM_LIMIT,
    Blocks,
    Spec,
    by_state,
    decay,
    for_each_step,
    over_states,
    row,
    rows_of_steps,
    states_of_steps,
    write_tiles,
)
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import interpreter, shaped_like

# A chunk of states has to fit into VMEM.
MOST_STATES = 64
# Steps in a trip for an interpreter: long code is but long to compile.
INTERPRETED_STEPS = LEAST_STEPS


def refuses(u, delta, A, B, C, D, z, resets, state) -> str | None:
    """What the kernels cannot do with these arguments, or None."""
    for name, x in (("u", u), ("delta", delta)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} has dtype {x.dtype}; the kernels take bfloat16 and float32"
    if A.shape[1] > MOST_STATES:
        return f"{A.shape[1]} states a channel; the kernels take up to {MOST_STATES}"
    return None


def selective_scan(u, delta, A, B, C, D, z, resets, state, *, interpret=False, device_kind=None):
    """Returns `(y [B, T, E], state [B, E, N])`; see the package for the arguments.

    `interpret`: as `pallas_call` has it. `device_kind`: for which TPU, as `jax.Device` says; None: `target`. Zeros fill
    up tokens, channels and states to whole tiles: with Δ = 0 a state stays as it is.
    """
    device_kind = device_kind or target().device_kind
    (_, time, channels), states = u.shape, A.shape[1]
    more_time, more_channels = -time % LANES, -channels % LANES
    more_states = -states % SUBLANES

    def pad(x, *axes):
        return None if x is None else jnp.pad(x, [(0, more) for more in axes])

    u, delta, z = (pad(x, 0, more_time, more_channels) for x in (u, delta, z))
    A = pad(A.T, more_states, more_channels)
    B, C = (pad(x, 0, more_time, more_states) for x in (B, C))
    D = pad(None if D is None else D[None], 0, more_channels)
    resets = pad(None if resets is None else resets[:, None].astype(jnp.int32), 0, 0, more_time)
    state = None if state is None else state.swapaxes(1, 2)
    state = pad(state, 0, more_states, more_channels)
    block = block_channels(
        device_kind,
        time=time,
        channels=u.shape[2],
        states=A.shape[0],
        dtype=u.dtype.name,
    )
    chunk = chunk_tokens(time=u.shape[1], channels=block, itemsize=u.dtype.itemsize)
    unrolled = unrolled_steps(
        chunk // STEP,
        least=LEAST_STEPS,
        block_states=block * A.shape[0],
        itemsize=u.dtype.itemsize,
    )
    unrolled = INTERPRETED_STEPS if interpret else unrolled
    spec = Spec(
        block,
        chunk,
        unrolled,
        matrix_width(device_kind),
        u.dtype == jnp.bfloat16 and has_bfloat16_vectors(device_kind),
        wide_tokens(u.dtype, channels=block, states=A.shape[0]),
        state is not None,
        interpreter(interpret, u),
    )
    y, state = _scan(spec, u, delta, A, B, C, D, z, resets, state)
    return y[:, :time, :channels], state[:, :states, :channels].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(spec, u, delta, A, B, C, D, z, resets, state):
    """In the kernels' layout: A [N, E], B and C [B, T, N], D [1, E], resets [B, 1, T], the state [B, N, E]."""
    y, last, _ = _call_forward(spec, u, delta, A, B, C, D, z, resets, state, keeps_pasts=False)
    return y, last


def _forward(spec, *arguments):
    arguments = values(arguments)
    y, last, pasts = _call_forward(spec, *arguments, keeps_pasts=True)
    y, pasts = keep(y, pasts)
    return (y, last), (*arguments[:-1], pasts)


def _call_forward(spec, u, delta, A, B, C, D, z, resets, state, *, keeps_pasts):
    (batch, time, channels), states = u.shape, A.shape[0]
    chunks = time // spec.chunk
    blocks = Blocks(spec, states, lambda c: c)
    in_specs = (
        blocks.tokens,
        blocks.tokens,
        blocks.per_channel,
        *[blocks.columns] * 2,
        None if D is None else blocks.channel_row,
        None if z is None else blocks.tokens,
        None if resets is None else blocks.resets,
        None if state is None else blocks.state,
    )
    B = B.swapaxes(1, 2).astype(jnp.float32 if spec.wide_tokens else u.dtype)
    C = C.swapaxes(1, 2).astype(columns_dtype(spec, u.dtype))
    pasts = shaped_like(u, (batch, time // STEP, states, channels), u.dtype)
    return tpu_call(
        functools.partial(_kernel, spec),
        grid=(batch, channels // spec.channels, chunks),
        in_specs=in_specs,
        out_specs=(blocks.tokens, blocks.state, blocks.pasts if keeps_pasts else None),
        out_shape=(
            shaped_like(u, u.shape, u.dtype),
            shaped_like(u, (batch, states, channels), jnp.float32),
            pasts if keeps_pasts else None,
        ),
        scratch_shapes=(
            *[rows_of_steps(spec)] * 2,
            columns_of_steps(spec, states, jnp.float32, spec.wide_tokens),
            columns_of_steps(spec, states, u.dtype, STEP - spec.wide_tokens),
            states_of_steps(spec, states, u.dtype, spec.group(states)),
            rows_of_tokens(spec.chunk if spec.packs_columns else LANES, states),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            # Blocks are those of the grid.
            disable_bounds_checks=True,
        ),
        interpret=spec.interpret,
        name="selective_scan_forward",
    )(u, delta, A, B, C, D, z, resets, state)


_scan.defvjp(_forward, tpu_backward.backward, symbolic_zeros=True)


def _kernel(
    spec, u, delta, A, B, C, D, z, resets, initial, y, state, past,
    steps, inputs, wide, packed, from_state, C_rows,
):  # fmt: skip
    """One chunk of one block of channels. The block of the last state holds the present one from chunk to chunk."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = jnp.zeros_like(state) if initial is None else initial[...]

    base2_A = A[...] * LOG2_E
    rounded, num_wide, group = u.dtype == jnp.bfloat16, spec.wide_tokens, spec.group(A.shape[0])
    if spec.packs_columns:
        C_rows[...] = all_in_rows(C)

    def prepare(at):
        step = delta[at.tokens].astype(jnp.float32)
        steps[at.slot] = step
        inputs[at.slot] = step * u[at.tokens].astype(jnp.float32)
        register = B[:, at.whole_register]
        if wide is not None:
            [wide[at.slot]] = columns([register], at, range(num_wide))
        if packed is not None:
            [packed[at.slot]] = columns([register.astype(u.dtype)], at, range(num_wide, STEP))
        read = C_rows[at.tokens] if spec.packs_columns else in_rows(C, C_rows, at)
        write_tiles(from_state, at.slot, by_state(read, group, rounded=rounded))

    def to_state(at, t, part):
        return widened(wide[at.slot, t] if t < num_wide else packed[at.slot, t - num_wide], part)

    def advance(at):
        for part in spec.parts():
            h, passed = state[:, part], []
            if past is not None:
                past[at.index, :, part] = h.astype(past.dtype)
            for t in range(STEP):
                kept = decay(row(steps, at, t, part) * base2_A[:, part], resets, at, t)
                h = kept * h + row(inputs, at, t, part) * to_state(at, t, part)
                passed.append(h)
            state[:, part] = h
            total = over_states(from_state, at, passed, rounded=rounded)
            if D is not None:
                total += D[:, part] * u[at.tokens, part].astype(jnp.float32)
            if z is not None:
                total *= jax.nn.silu(z[at.tokens, part].astype(jnp.float32))
            y[at.tokens, part] = total.astype(y.dtype)

    for_each_step(spec, prepare, advance)
