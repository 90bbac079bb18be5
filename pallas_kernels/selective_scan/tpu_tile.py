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

from pallas_kernels.selective_scan.tpu_blocks import LANES

SUBLANES = 8
LOG2_E = 1.4426950408889634
# A chunk of states in the backward is 8 MiB at N = 16 and 1024 channels and 17 MiB at the most; blocks and rows of the
# chunk take 9.
VMEM_LIMIT = 32 * 2**20
MOST_IN_REGISTERS = 3 * LANES


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

    @property
    def part(self) -> int:
        """Channels whose states are in registers together, beside what a step in time needs of them.

        A block has more, so that its parts share the columns of B and C.
        """
        widths = range(2 * LANES, MOST_IN_REGISTERS + 1, LANES)
        return max((x for x in widths if self.channels % x == 0), default=self.channels)

    @property
    def parts(self) -> list[slice]:
        return [slice(i, i + self.part) for i in range(0, self.channels, self.part)]


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


def for_each_register(tokens, *, reverse: bool = False) -> None:
    """Calls `tokens(start)` for every register of 8 tokens of a chunk, which begins with token `start`.

    Two of them a step of the loop: the columns of one are brought to their lanes beside the arithmetic of the other.
    """
    registers = LANES // SUBLANES

    def step(i, _):
        tokens(SUBLANES * (registers - 1 - i if reverse else i))

    jax.lax.fori_loop(0, registers, step, None, unroll=2)


def row(ref, t, part: slice):
    """Token t of a part of [T, channels]: [1, part]."""
    return ref[pl.ds(t, 1), part]


def decay(delta, base2_A, resets, t):
    """exp(Δ_t A) [N, part], 0 where the state is emptied before token t; `base2_A` is A / ln 2."""
    kept = jnp.exp2(delta * base2_A)
    return kept if resets is None else kept * (1 - resets[0, t]).astype(jnp.float32)


class StateSums:
    """Sums over the states of every token of a chunk, [N, channels] -> [1, channels].

    To add up the sublanes of one register takes as many rotations as additions. Here `put` does so once and leaves four
    rows a token in `ref`, and `total` adds rows of the same place for eight tokens at a time: loads with a stride, as
    hardware has them for arrays of one register's width, up to a stride of four as one load.
    """

    ROWS = SUBLANES // 2

    def __init__(self, ref):
        self.ref = ref

    @classmethod
    def scratch(cls, spec: Spec):
        return pltpu.VMEM((spec.channels // LANES, cls.ROWS * spec.chunk, LANES), jnp.float32)

    def put(self, t, part: slice, x):
        rows = sum(x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES))
        rows = (rows + pltpu.roll(rows, self.ROWS, 0))[: self.ROWS]
        start = pl.multiple_of(self.ROWS * t, self.ROWS)
        for i in range(0, x.shape[1], LANES):
            group = (part.start + i) // LANES
            self.ref[group, pl.ds(start, self.ROWS), :] = rows[:, i : i + LANES]

    def total(self):
        """[chunk, channels]."""
        parts, rows, _ = self.ref.shape
        tokens = rows // self.ROWS

        def place(i, row):
            return self.ref.at[i][pl.ds(row, tokens, stride=self.ROWS), :]

        return jnp.concatenate(
            [sum(place(i, row) for row in range(self.ROWS)) for i in range(parts)], axis=1
        )


def columns(ref, start, width: int):
    """Columns of [N, chunk] for the 8 tokens from `start` on, each spread over lanes: a list of [N, width].

    A rotation by a number brings them to fixed lanes.
    """
    rotated = pltpu.roll(ref[...], (LANES - start) % LANES, axis=1)
    return [
        jnp.tile(jnp.broadcast_to(rotated[:, j : j + 1], rotated.shape), (1, width // LANES))
        for j in range(SUBLANES)
    ]


def add_lane_groups(x):
    """[N, width] -> [N, 128]."""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def set_columns(ref, start, sums) -> None:
    """Sums over lanes of [N, 128] for each of the 8 tokens from `start` on, as columns of [N, chunk]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 1)
    out = ref[...]
    for j, x in enumerate(sums):
        out = jnp.where(lane == start + j, x.sum(axis=1, keepdims=True), out)
    ref[...] = out
