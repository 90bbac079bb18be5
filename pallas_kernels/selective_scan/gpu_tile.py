"""One token of the GPU kernels of the selective scan: where its states and values lie in registers.

A warpgroup has the states of 64 channels in registers, [4 warps, 16 channels, N]: eight lanes along the channels and
four along N. What belongs to a channel (Δ_t, u_t) is then in the registers of its four lanes, what belongs to a state
(B_t, C_t) in those of eight, and a sum over either is a few shuffles inside a warp, never a barrier between warps.
What is elementwise, the gate and its gradient, is left to whole chunks of tokens, where no lane repeats another.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import WARPGROUPS

LOG2_E = math.log2(math.e)
WARPS = 4
# Channels of a warp, of a warpgroup and of a block.
WARP_CHANNELS = 16
CHANNELS = WARPS * WARP_CHANNELS
BLOCK = WARPGROUPS * CHANNELS
# Tokens a step of the loop in a chunk: their loads and exponentials wait for nothing.
UNROLL = 4
# States [warps, channels, N]; vectors along the channels are [warps, channels], along the states [N].
STATES = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, WARP_CHANNELS, 8), (8, 8), (2,))),
    warp_dims=(-6,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
ALONG_CHANNELS = STATES.reduce(2)
ALONG_STATES = STATES.reduce((0, 1))
# Chunks [time, warps, channels]: here a warp has whole tokens.
TOKENS = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, WARPS, WARP_CHANNELS), (2,))),
    warp_dims=(-4,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def load(ref, layout, dtype=jnp.float32):
    """HBM or shared memory -> registers."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(dtype)


def load_states(ref):
    """States in HBM -> registers, to begin a loop with.

    Under `jax.shard_map` the type of what is loaded varies over mesh axes, which JAX drops at the first operation in a
    kernel, and a loop has to end with the type that it began with. The product itself is folded away.
    """
    return load(ref, STATES) * 1.0


def store(ref, x) -> None:
    """Registers -> HBM or shared memory."""
    plgpu.store(ref, x.astype(ref.dtype), optimized=False)


def over_states(vector, shape):
    """[warps, channels] -> [warps, channels, N]."""
    return jax.lax.broadcast_in_dim(vector, shape, (0, 1))


def over_channels(vector, shape):
    """[N] -> [warps, channels, N]."""
    return jax.lax.broadcast_in_dim(vector, shape, (2,))


def over_time(rows, shape):
    """[warps, channels] -> [time, warps, channels]."""
    return jax.lax.broadcast_in_dim(rows, shape, (1, 2))


def decay(delta, base2_A, reset):
    """exp(Δ A) [warps, channels, N], 0 where the state is emptied; `base2_A` is A / ln 2, `reset` -inf, 0 or None."""
    exponent = over_states(delta, base2_A.shape) * base2_A
    return jnp.exp2(exponent if reset is None else exponent + reset)


def sigmoid(x):
    return 1 / (1 + jnp.exp2(-LOG2_E * x))


class Token(NamedTuple):
    """What a token brings, in registers: u and delta [warps, channels], B and C [N], reset a number or None."""

    u: Any
    delta: Any
    B: Any
    C: Any
    reset: Any

    @classmethod
    def load(cls, chunk, t) -> "Token":
        """Token t of a `gpu_chunks.Chunk`."""
        return cls(
            load(chunk.u.at[t], ALONG_CHANNELS),
            load(chunk.delta.at[t], ALONG_CHANNELS),
            load(chunk.B.at[t], ALONG_STATES),
            load(chunk.C.at[t], ALONG_STATES),
            None if chunk.resets is None else chunk.resets[t],
        )

    def advance(self, h, base2_A):
        """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t."""
        write = over_states(self.delta * self.u, h.shape) * over_channels(self.B, h.shape)
        return decay(self.delta, base2_A, self.reset) * h + write

    def read(self, h):
        """C_t h_t [warps, channels]."""
        return jnp.sum(h * over_channels(self.C, h.shape), axis=2)


def for_tokens(length: int, function, carry, *, reverse: bool = False):
    """`carry = function(ts, carry)` for `UNROLL` of `length` tokens at a time, from the first or the last one on."""

    def step(i, carry):
        order = range(UNROLL)
        first = i * UNROLL
        if reverse:
            order, first = reversed(order), length - UNROLL - first
        return function([first + j for j in order], carry)

    return jax.lax.fori_loop(0, length // UNROLL, step, carry)
