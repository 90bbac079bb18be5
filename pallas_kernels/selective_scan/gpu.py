"""The selective scan for NVIDIA Hopper (Pallas, Mosaic GPU): states stay in registers from the first token to the last.

Gu and Dao, arXiv 2312.00752, section 3.3.2: states never reach HBM, but for the one before each chunk of tokens, from
which the backward (`gpu_backward`) computes the others again. Each of two warpgroups has 64 channels; time is walked in
order, and batch times channels is what runs in parallel, or where that is too little, parts of time too (`gpu_parts`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import WARPGROUPS
from pallas_kernels.residuals import keep
from pallas_kernels.selective_scan import gpu_backward, gpu_chunks, gpu_parts, gpu_tile
from pallas_kernels.selective_scan.gpu_chunks import Chunk, Inputs, Spec
from pallas_kernels.selective_scan.gpu_tile import (
    BLOCK,
    LOG2_E,
    STATES,
    TOKENS,
    WARP_CHANNELS,
    WARPS,
    Token,
    load,
    store,
)
from pallas_kernels.selective_scan.state import state_or_zeros
from pallas_kernels.varying import vary_alike

# The states of the shortest chunk have to fit into shared memory.
MOST_STATES = 32


def refuses(u, delta, A, B, C, D, z, resets, state) -> str | None:
    """What the kernels cannot do with these arguments or on this GPU, or None."""
    for name, x in (("u", u), ("delta", delta)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} has dtype {x.dtype}; the kernels take bfloat16 and float32"
    if A.shape[1] > MOST_STATES:
        return f"{A.shape[1]} states a channel; the kernels take up to {MOST_STATES}"
    return hopper.refuses_device()


def selective_scan(u, delta, A, B, C, D, z, resets, state, *, interpret=False):
    """Returns `(y [B, T, E], state [B, E, N])`; see the package for the arguments.

    `interpret`: True or a `plgpu.InterpretGPUParams` to run without a GPU. Zeros fill up tokens, channels and states to
    whole tiles: with Δ = 0 a state stays as it is.
    """
    state = state_or_zeros(state, u, A)
    (_, time, channels), states = u.shape, A.shape[1]
    most_states = max(8, 2 ** (states - 1).bit_length())
    chunk = gpu_chunks.chunk_size(u, delta, z, most_states)
    more_channels, more_states = -channels % BLOCK, most_states - states
    parts = gpu_parts.count(u.shape[0], time, channels + more_channels)
    more_time = -time % (chunk * parts)

    def pad(x, *axes):
        return None if x is None else jnp.pad(x, [(0, more) for more in axes])

    u, delta, z = (pad(x, 0, more_time, more_channels) for x in (u, delta, z))
    A, D = pad(A, more_channels, more_states), pad(D, more_channels)
    B, C = (pad(x, 0, more_time, more_states) for x in (B, C))
    resets = pad(resets, 0, more_time)
    state = pad(state, 0, more_channels, more_states)
    spec = Spec(chunk, hopper.interpreter(interpret))
    arguments = vary_alike((u, delta, A, B, C, D, z, resets, state))
    y, state = gpu_parts.walk(functools.partial(_scan, spec), parts, *arguments)
    return y[:, :time, :channels], state[:, :channels, :states]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(spec, u, delta, A, B, C, D, z, resets, state):
    return _call_forward(spec, u, delta, A, B, C, D, z, resets, state, keeps_pasts=False)[:2]


def _forward(spec, *arguments):
    y, last, pasts = _call_forward(spec, *arguments, keeps_pasts=True)
    y, pasts = keep(y, pasts)
    return (y, last), (*arguments[:-1], pasts)


_scan.defvjp(_forward, gpu_backward.backward)


def _call_forward(spec, u, delta, A, B, C, D, z, resets, state, *, keeps_pasts):
    """`(y, last state, pasts)`; pasts [B, chunks, E / 16, 16, N] are the states before each chunk, or None."""
    inputs = gpu_chunks.inputs(u, delta, A, B, C, D, z, resets)
    (batch, time, channels), states = u.shape, A.shape[1]
    of_warps = (channels // WARP_CHANNELS, WARP_CHANNELS, states)
    out = [(inputs.u.shape, u.dtype), ((batch, *of_warps), jnp.float32)]
    if keeps_pasts:
        out.append(((batch, time // spec.chunk, *of_warps), jnp.float32))
    y, last, *pasts = hopper.call(
        functools.partial(_kernel, spec),
        (inputs, state.reshape(batch, *of_warps)),
        out=out,
        scratch=(
            plgpu.SMEM((WARPGROUPS, spec.chunk, WARPS, WARP_CHANNELS), jnp.float32),
            gpu_chunks.chunk_ring(spec, gpu_chunks.streams(inputs)),
        ),
        grid=gpu_chunks.grid(batch, channels),
        interpret=spec.interpret,
        has_barriers=False,
        name="selective_scan_forward",
    )
    return y.reshape(u.shape), last.reshape(state.shape), pasts[0] if pasts else None


def _kernel(spec: Spec, inputs: Inputs, initial, y, last, *rest):
    """A block: all tokens of BLOCK channels of a row -> their y, last state and, if wanted, states before chunks."""
    *pasts, reads, ring = rest
    batch, block = (jax.lax.axis_index(name) for name in gpu_chunks.AXES)
    streams = gpu_chunks.streams(inputs)
    num_chunks = inputs.u.shape[1] // spec.chunk
    warpgroup = jax.lax.axis_index("warpgroup")
    chunks = ring.start(
        num_chunks, lambda i: gpu_chunks.chunk_in_hbm(spec, streams, batch, block, i)
    )

    warps = gpu_chunks.warps_of(block, warpgroup)
    base2_A = load(inputs.A.at[warps], STATES) * LOG2_E
    skip = None if inputs.D is None else load(inputs.D.at[warps], TOKENS.reduce(0))
    own_reads = reads.at[warpgroup]

    def advance(i, pieces, h):
        chunk = Chunk(**dict(zip(streams, pieces, strict=True))).of_warpgroup(warpgroup)
        if pasts:
            store(pasts[0].at[batch, i, warps], h)

        def tokens(ts, h):
            for t, token in [(t, Token.load(chunk, t)) for t in ts]:
                h = token.advance(h, base2_A)
                store(own_reads.at[t], token.read(h))
            return h

        h = gpu_tile.for_tokens(spec.chunk, tokens, h)
        # From warps that have channels to warps that have tokens; none writes again before all have read.
        plgpu.commit_smem()
        out = load(own_reads, TOKENS)
        if skip is not None:
            out += gpu_tile.over_time(skip, out.shape) * load(chunk.u, TOKENS)
        if chunk.z is not None:
            gate = load(chunk.z, TOKENS)
            out *= gate * gpu_tile.sigmoid(gate)
        store(y.at[batch, pl.ds(i * spec.chunk, spec.chunk), warps], out)
        plgpu.commit_smem()
        return h

    h = gpu_tile.load_states(initial.at[batch, warps])
    store(last.at[batch, warps], chunks.fold(advance, h))
