"""What the TPU kernels of the selective scan share: block sizes, layout, and the pieces of one step in time.

Channels lie on lanes. A state is [N, channels], so that the step Δ_t and the input u_t of a token are rows, which
spread over the sublanes of a state as they are loaded. B_t and C_t are columns of [N, T] and have to be spread over
lanes; a block of many channels shares that work.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
LOG2_E = 1.4426950408889634
# A chunk of states in the backward is 4 MiB at N = 16 and 512 channels and 17 MiB at the most; blocks and rows of the
# chunk take 8.
VMEM_LIMIT = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments.

    Attributes:
        channels: channels a block, a multiple of 128.
        interpret: as `pallas_call` has it.
    """

    channels: int
    interpret: object

    # Tokens a chunk: B and C have tokens on lanes.
    chunk = LANES


class Blocks:
    """Block specs for the grid batch x channel blocks x chunks; `chunk_of` gives the chunk of a grid step."""

    def __init__(self, spec: Spec, states: int, chunk_of):
        wide = (None, spec.chunk, spec.channels)
        self.tokens = pl.BlockSpec(wide, lambda b, e, c: (b, chunk_of(c), e))
        self.columns = pl.BlockSpec((None, states, spec.chunk), lambda b, e, c: (b, 0, chunk_of(c)))
        self.resets = pl.BlockSpec(
            (None, 1, spec.chunk), lambda b, e, c: (b, 0, chunk_of(c)), memory_space=pltpu.SMEM
        )
        self.per_channel = pl.BlockSpec((states, spec.channels), lambda b, e, c: (0, e))
        self.channel_row = pl.BlockSpec((1, spec.channels), lambda b, e, c: (0, e))
        state = (None, states, spec.channels)
        self.state = pl.BlockSpec(state, lambda b, e, c: (b, 0, e))
        self.state_row = pl.BlockSpec((None, 1, spec.channels), lambda b, e, c: (b, 0, e))
        self.pasts = pl.BlockSpec((None, *state), lambda b, e, c: (b, chunk_of(c), 0, e))
        # Sums over the channels of a block only.
        self.partial_columns = pl.BlockSpec(
            (None, None, states, spec.chunk), lambda b, e, c: (b, e, 0, chunk_of(c))
        )


def for_each_register(tokens, state):
    """Passes the state through `tokens(i, state)` for every register of 8 tokens of a chunk.

    Two of them a step of the loop: the columns of one are brought to their lanes beside the arithmetic of the other.
    """
    return jax.lax.fori_loop(0, LANES // SUBLANES, tokens, state, unroll=2)


def row(ref, t):
    """Token t of [T, channels]: [1, channels]."""
    return ref[pl.ds(t, 1), :]


def decay(delta, base2_A, resets, t):
    """exp(Δ_t A) [N, channels], 0 where the state is emptied before token t; `base2_A` is A / ln 2."""
    kept = jnp.exp2(delta * base2_A)
    return kept if resets is None else kept * (1 - resets[0, t]).astype(jnp.float32)


class StateSums:
    """Sums over the states of every token of a chunk, [N, channels] -> [1, channels].

    To add the sublanes of one register takes as many rotations as additions. Here `put` leaves eight rows a token in
    `ref`, and `total` adds rows of the same place for eight tokens at a time: loads with a stride, which the hardware
    has for arrays of one register's width.
    """

    def __init__(self, ref):
        self.ref = ref

    @staticmethod
    def scratch(spec: Spec):
        return pltpu.VMEM((spec.channels // LANES, SUBLANES * spec.chunk, LANES), jnp.float32)

    def put(self, t, x):
        rows = sum(x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES))
        start = pl.multiple_of(SUBLANES * t, SUBLANES)
        for i in range(self.ref.shape[0]):
            part = rows[:, i * LANES : (i + 1) * LANES]
            self.ref[i, pl.ds(start, SUBLANES), :] = part

    def total(self):
        """[chunk, channels]."""
        parts, rows, _ = self.ref.shape
        tokens = rows // SUBLANES

        def place(i, sublane):
            return self.ref.at[i][pl.ds(sublane, tokens, stride=SUBLANES), :]

        return jnp.concatenate(
            [sum(place(i, sublane) for sublane in range(SUBLANES)) for i in range(parts)], axis=1
        )


class Columns:
    """Columns of [N, chunk], for the tokens from `start` on; a rotation by a number brings them to fixed lanes."""

    def __init__(self, ref, start):
        self.rotated = pltpu.roll(ref[...], (LANES - start) % LANES, axis=1)

    def __getitem__(self, j):
        return self.rotated[:, j : j + 1]
