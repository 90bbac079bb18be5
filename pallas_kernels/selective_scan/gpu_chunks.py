"""Chunks of tokens, as they pass through the GPU kernels of the selective scan: their length, tiles and ring."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.hopper import STAGES, WARPGROUPS, Ring, ring
from pallas_kernels.selective_scan.gpu_tile import BLOCK, CHANNELS, WARP_CHANNELS, WARPS

# Tokens of a chunk: the most whose states, kept by the backward, fit into shared memory.
CHUNKS = (16, 8, 4)
SHARED_MEMORY = 225 * 2**10
# Axes of the grid.
AXES = ("batch", "block")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static arguments of the kernels.

    Attributes:
        chunk: tokens of a chunk, one of `CHUNKS`.
        interpret: as `hopper.call` takes it.
    """

    chunk: int
    interpret: Any


class Inputs(NamedTuple):
    """The arguments, or references to them, as the kernels take them.

    Attributes:
        u, delta: [B, T, E / 16, 16].
        A: float32 [E / 16, 16, N].
        B, C: [B, T, N].
        D: float32 [E / 16, 16], or None.
        z: [B, T, E / 16, 16], or None.
        resets: float32 [B, T], -inf where the state is emptied before the token and else 0, or None.
    """

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    resets: Any


def inputs(u, delta, A, B, C, D, z, resets) -> Inputs:
    """From arrays [B, T, E], A [E, N], B and C [B, T, N], D [E] and resets bool [B, T]."""

    def by_warps(x):
        return None if x is None else x.reshape(*x.shape[:-1], -1, WARP_CHANNELS)

    A = A.reshape(-1, WARP_CHANNELS, A.shape[1])
    if resets is not None:
        resets = jnp.where(resets, -jnp.inf, jnp.zeros((), jnp.float32))
    return Inputs(by_warps(u), by_warps(delta), A, B, C, by_warps(D), by_warps(z), resets)


def chunk_size(u, delta, z, states: int) -> int:
    """Tokens of a chunk for these arrays and N = `states`."""

    def needed(chunk):
        streams = (3 if z is not None else 2) * u.dtype.itemsize + delta.dtype.itemsize
        tile = chunk * (BLOCK * streams + 2 * states * u.dtype.itemsize + 4) + 4 * BLOCK * states
        kept = chunk * (CHANNELS * states + 2 * CHANNELS + 2 * WARPS * states) * 4
        return STAGES * tile + WARPGROUPS * kept

    return next(chunk for chunk in CHUNKS if needed(chunk) <= SHARED_MEMORY)


class Chunk(NamedTuple):
    """References to the tiles of a chunk in shared memory, for the channels of a block or of a warpgroup.

    Attributes:
        u, delta: [chunk, warps, 16].
        B, C: [chunk, N].
        z: [chunk, warps, 16], or None.
        resets: [chunk], or None.
        past: [warps, 16, N], the state before the chunk, in the backward.
        d_y: [chunk, warps, 16], in the backward.
    """

    u: Any
    delta: Any
    B: Any
    C: Any
    z: Any = None
    resets: Any = None
    past: Any = None
    d_y: Any = None

    def of_warpgroup(self, warpgroup) -> "Chunk":
        warps = pl.ds(warpgroup * WARPS, WARPS)
        mine = {
            name: x.at[warps] if name == "past" else x.at[:, warps]
            for name, x in self._asdict().items()
            if x is not None and name in (*OF_CHANNELS, "past")
        }
        return self._replace(**mine)


# The fields of a chunk that are [chunk, warps, 16].
OF_CHANNELS = ("u", "delta", "z", "d_y")


def streams(inputs: Inputs, **more) -> dict[str, Any]:
    """What is copied chunk by chunk, by its name in `Chunk`: arrays or references to HBM."""
    names = ("u", "delta", "B", "C", "z", "resets")
    given = {name: getattr(inputs, name) for name in names} | more
    return {name: x for name, x in given.items() if x is not None}


def chunk_ring(spec: Spec, streams: dict) -> Ring:
    """Scratch for a ring of chunks."""
    warps = WARPGROUPS * WARPS

    def shape(name, x):
        if name == "past":
            return warps, *x.shape[3:]
        return (
            (spec.chunk, warps, WARP_CHANNELS)
            if name in OF_CHANNELS
            else (spec.chunk, *x.shape[2:])
        )

    return ring(*((shape(name, x), x.dtype) for name, x in streams.items()))


def chunk_in_hbm(spec: Spec, streams: dict, batch, block, index) -> list:
    """References to the pieces of the chunk `index` of a block, as `chunk_ring` takes them."""
    tokens = pl.ds(index * spec.chunk, spec.chunk)
    warps = pl.ds(block * WARPGROUPS * WARPS, WARPGROUPS * WARPS)

    def place(name):
        if name == "past":
            return batch, index, warps
        return (batch, tokens, warps) if name in OF_CHANNELS else (batch, tokens)

    return [x.at[place(name)] for name, x in streams.items()]


# The grid.


def grid(batch: int, channels: int) -> dict[str, int]:
    """Blocks of the same row run together, and share B and C in the cache of the chip."""
    return dict(zip(AXES, (batch, channels // BLOCK), strict=True))


def warps_of(block, warpgroup):
    """The slice of E / 16 that a warpgroup has."""
    return pl.ds((block * WARPGROUPS + warpgroup) * WARPS, WARPS)
