"""The backward of the selective scan for NVIDIA Hopper: chunk after chunk from the last to the first, tokens likewise.

With g_t the adjoint of h_t, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}, every gradient is a sum of products of g_t with
what the token t had: over states for u and Δ, over channels for B and C, over tokens for A and D. A chunk is walked
twice: forward from the state before it, whose successors are kept in shared memory, and backward with them.

No two blocks add to the same place, so that a gradient is the same in each run: those of B and C leave a block as sums
over the channels of a warpgroup, which XLA adds up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import WARPGROUPS
from pallas_kernels.selective_scan import gpu_chunks, gpu_tile
from pallas_kernels.selective_scan.gpu_chunks import Chunk, Inputs, Spec
from pallas_kernels.selective_scan.gpu_tile import (
    ALONG_CHANNELS,
    LOG2_E,
    STATES,
    TOKENS,
    WARP_CHANNELS,
    WARPS,
    Token,
    load,
    over_channels,
    over_states,
    over_time,
    store,
)


def backward(spec: Spec, saved, cotangents):
    """Gradients of the arguments of `_scan`; the rule of the custom VJP in `gpu.py`."""
    u, delta, A, B, C, D, z, resets, pasts = saved
    d_y, d_last = cotangents
    (batch, time, channels), states = u.shape, A.shape[1]
    inputs = gpu_chunks.inputs(u, delta, A, B, C, D, z, resets)
    warps = (channels // WARP_CHANNELS, WARP_CHANNELS)
    of_state = ((batch, *warps, states), jnp.float32)
    partial = ((batch, channels // gpu_tile.CHANNELS, time, states), jnp.float32)
    out = {
        "u": (inputs.u.shape, u.dtype),
        "delta": (inputs.u.shape, delta.dtype),
        "A": of_state,
        "B": partial,
        "C": partial,
        "state": of_state,
    }
    if D is not None:
        out["D"] = ((batch, *warps), jnp.float32)
    if z is not None:
        out["z"] = (inputs.u.shape, z.dtype)
    d_y = d_y.reshape(inputs.u.shape)
    own = (WARPGROUPS, spec.chunk)
    results = hopper.call(
        functools.partial(_kernel, spec, tuple(out)),
        (inputs, pasts, d_y, d_last.reshape(of_state[0])),
        out=out.values(),
        scratch=(
            plgpu.SMEM((*own, WARPS, WARP_CHANNELS, states), jnp.float32),
            plgpu.SMEM((*own, WARPS, WARP_CHANNELS), jnp.float32),
            plgpu.SMEM((*own, WARPS, WARP_CHANNELS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, 2, WARPS, spec.chunk, states), jnp.float32),
            gpu_chunks.chunk_ring(spec, gpu_chunks.streams(inputs, past=pasts, d_y=d_y)),
        ),
        grid=gpu_chunks.grid(batch, channels),
        interpret=spec.interpret,
        has_barriers=False,
        name="selective_scan_backward",
    )
    d = dict(zip(out, results, strict=True))
    return (
        d["u"].reshape(u.shape),
        d["delta"].reshape(u.shape),
        d["A"].sum(axis=0).reshape(A.shape),
        d["B"].sum(axis=1).astype(B.dtype),
        d["C"].sum(axis=1).astype(C.dtype),
        None if D is None else d["D"].sum(axis=0).reshape(D.shape),
        None if z is None else d["z"].reshape(u.shape),
        None,
        d["state"].reshape(batch, channels, states),
    )


class _Scratch(NamedTuple):
    """Shared memory of a warpgroup.

    Attributes:
        states: [chunk, warps, 16, N], the state before each token.
        reads: [chunk, warps, 16]; of each token first C h, then its gradient, then that of u.
        steps: [chunk, warps, 16], the gradients of Δ.
        columns: [2, warps, chunk, N], those of B and of C as sums over the channels of a warp.
    """

    states: Any
    reads: Any
    steps: Any
    columns: Any


def _kernel(spec: Spec, names, inputs: Inputs, pasts, d_y, d_last, *rest):
    """A block: all tokens of BLOCK channels of a row -> the gradients `names` of what they had."""
    d = dict(zip(names, rest, strict=False))
    *scratch, ring = rest[len(names) :]
    batch, block = (jax.lax.axis_index(name) for name in gpu_chunks.AXES)
    streams = gpu_chunks.streams(inputs, past=pasts, d_y=d_y)
    num_chunks = inputs.u.shape[1] // spec.chunk
    warpgroup = jax.lax.axis_index("warpgroup")
    chunks = ring.start(
        num_chunks,
        lambda i: gpu_chunks.chunk_in_hbm(spec, streams, batch, block, num_chunks - 1 - i),
    )

    warps = gpu_chunks.warps_of(block, warpgroup)
    own = _Scratch(*(x.at[warpgroup] for x in scratch))
    base2_A = load(inputs.A.at[warps], STATES) * LOG2_E
    skip = None if inputs.D is None else inputs.D.at[warps]

    def retreat(i, pieces, carry):
        index = num_chunks - 1 - i
        tokens = pl.ds(index * spec.chunk, spec.chunk)
        chunk = Chunk(**dict(zip(streams, pieces, strict=True))).of_warpgroup(warpgroup)
        h = _walk_forward(spec, chunk, base2_A, own)
        d_z = _through_gate(chunk, skip, own)
        # Warps that have tokens and warps that have channels meet at each commit.
        plgpu.commit_smem()
        _, *carry = _walk_back(spec, chunk, base2_A, skip, own, (h, *carry))
        plgpu.commit_smem()
        store(d["u"].at[batch, tokens, warps], load(own.reads, TOKENS))
        store(d["delta"].at[batch, tokens, warps], load(own.steps, TOKENS))
        if d_z is not None:
            store(d["z"].at[batch, tokens, warps], d_z)
        for name, of_warps in (("B", own.columns.at[0]), ("C", own.columns.at[1])):
            place = d[name].at[batch, block * WARPGROUPS + warpgroup, tokens]
            layout = plgpu.Layout.WG_STRIDED(place.shape, vec_size=1)
            store(place, sum(load(of_warps.at[warp], layout) for warp in range(WARPS)))
        plgpu.commit_smem()
        return carry

    adjoint = gpu_tile.load_states(d_last.at[batch, warps])
    to_D = None if skip is None else plgpu.layout_cast(jnp.zeros(skip.shape), ALONG_CHANNELS)
    start = [adjoint, jnp.zeros_like(adjoint), to_D]
    adjoint, to_A, to_D = chunks.fold(retreat, start)
    store(d["state"].at[batch, warps], adjoint)
    store(d["A"].at[batch, warps], to_A)
    if to_D is not None:
        store(d["D"].at[batch, warps], to_D)


def _walk_forward(spec: Spec, chunk: Chunk, base2_A, own: _Scratch):
    """Leaves the state before each token of the chunk and, for the gate, C h of it; returns the last state."""

    def tokens(ts, h):
        for t, token in [(t, Token.load(chunk, t)) for t in ts]:
            store(own.states.at[t], h)
            h = token.advance(h, base2_A)
            if chunk.z is not None:
                store(own.reads.at[t], token.read(h))
        return h

    h = gpu_tile.for_tokens(spec.chunk, tokens, load(chunk.past, STATES))
    if chunk.z is not None:
        plgpu.commit_smem()
    return h


def _through_gate(chunk: Chunk, skip, own: _Scratch):
    """Leaves the gradients of C h + D u, from those of y; returns those of z, or None."""
    d_y = load(chunk.d_y, TOKENS)
    if chunk.z is None:
        store(own.reads, d_y)
        return None
    ungated, gate = load(own.reads, TOKENS), load(chunk.z, TOKENS)
    if skip is not None:
        of_tokens = over_time(load(skip, TOKENS.reduce(0)), ungated.shape)
        ungated += of_tokens * load(chunk.u, TOKENS)
    half = gpu_tile.sigmoid(gate)
    store(own.reads, d_y * gate * half)
    return d_y * ungated * half * (1 + gate * (1 - half))


def _walk_back(spec: Spec, chunk: Chunk, base2_A, skip, own: _Scratch, carry):
    """Leaves the gradients of each token; `carry`: state, adjoint, and the gradients of A and D (or None) so far."""
    D = None if skip is None else load(skip, ALONG_CHANNELS)

    def back(t, token, d_read, before, carry):
        h, g, to_A, to_D = carry
        reads, steps = (over_states(x, h.shape) for x in (d_read, token.delta))
        g += reads * over_channels(token.C, g.shape)
        store(
            own.columns.at[0, :, t],
            jnp.sum(g * over_states(token.delta * token.u, g.shape), axis=1),
        )
        store(own.columns.at[1, :, t], jnp.sum(h * reads, axis=1))
        d_write = jnp.sum(g * over_channels(token.B, g.shape), axis=2)
        g *= gpu_tile.decay(token.delta, base2_A, token.reset)
        d_exponent = g * before
        d_step = jnp.sum(d_exponent * base2_A, axis=2) * (1 / LOG2_E) + d_write * token.u
        d_u = d_write * token.delta
        if D is not None:
            d_u += D * d_read
            to_D += d_read * token.u
        # Four lanes have read what each of them overwrites: their shuffles for the sums lie in between.
        store(own.reads.at[t], d_u)
        store(own.steps.at[t], d_step)
        return before, g, to_A + d_exponent * steps, to_D

    def tokens(ts, carry):
        loaded = [
            (
                t,
                Token.load(chunk, t),
                load(own.reads.at[t], ALONG_CHANNELS),
                load(own.states.at[t], STATES),
            )
            for t in ts
        ]
        for values in loaded:
            carry = back(*values, carry)
        return carry

    return gpu_tile.for_tokens(spec.chunk, tokens, carry, reverse=True)
