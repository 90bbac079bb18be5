"""What the TPU kernels of the selective scan share: block sizes, layout, and the pieces of one step in time.

Channels lie on lanes. A state is [N, channels], so that the step Δ_t and the input u_t of a token are rows, which
spread over the sublanes of a state as they are loaded. B_t and C_t are columns of [N, T] and have to be spread over
lanes; a block of many channels shares that work.

The vector unit has most to do, so that sums over the states or the channels of a token are left to the matrix unit: the
states of `STEP` tokens below each other are one operand, and of each token only its own place in the product counts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.tpu_blocks import LANES

SUBLANES = 8
# Contracted dimensions of a product.
PLAIN = ((1,), (0,))
LAST = ((1,), (1,))
# Tokens of a step of the loops: the rows of a bfloat16 register.
STEP = 16
LOG2_E = 1.4426950408889634
# A chunk of states in the backward is 17 MiB at the most; blocks and rows of the chunk take 9.
VMEM_LIMIT = 32 * 2**20
# Channels whose states are in registers together.
MOST_IN_REGISTERS = 2 * LANES


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments.

    Attributes:
        channels: channels a block, a multiple of 128.
        chunk: tokens a grid step, a multiple of 128: B and C have tokens on lanes.
        interpret: as `pallas_call` has it.
    """

    channels: int
    chunk: int
    interpret: object

    @property
    def parts(self) -> list[slice]:
        """Of a block, the channels that go through a step in time together, beside what it needs of them.

        A block has more, so that its parts share the columns of B and C.
        """
        starts = range(0, self.channels, MOST_IN_REGISTERS)
        return [slice(i, min(i + MOST_IN_REGISTERS, self.channels)) for i in starts]


class Blocks:
    """Block specs for the grid batch x channel blocks x chunks; `chunk_of` gives the chunk of a grid step."""

    def __init__(self, spec: Spec, states: int, chunk_of):
        wide = (None, spec.chunk, spec.channels)
        self.tokens = pl.BlockSpec(wide, lambda b, e, c: (b, chunk_of(c), e))
        self.columns = pl.BlockSpec((None, states, spec.chunk), lambda b, e, c: (b, 0, chunk_of(c)))
        self.rows = pl.BlockSpec((None, spec.chunk, states), lambda b, e, c: (b, chunk_of(c), 0))
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
        self.partial_rows = pl.BlockSpec(
            (None, None, spec.chunk, states), lambda b, e, c: (b, e, chunk_of(c), 0)
        )


def step_tokens(index):
    """The tokens of a step, to index refs with."""
    return pl.ds(pl.multiple_of(STEP * index, STEP), STEP)


def for_each_step(spec: Spec, prepare, advance, *, reverse: bool = False) -> None:
    """Takes the steps of a chunk through two stages, each called with the number of a step and a slot, 0 or 1 in turn,
    for what the first leaves to the second.

    A step is prepared before the one ahead of it advances, since columns take long to come to their lanes. Four steps
    of the loop are unrolled: at its end the last products are waited for.
    """
    count = spec.chunk // STEP

    def number(i):
        return count - 1 - i if reverse else i

    def four(i, _):
        for j in range(4):
            # After the last comes the first again, for nothing.
            prepare(number((4 * i + j + 1) % count), (j + 1) % 2)
            advance(number(4 * i + j), j % 2)

    prepare(number(0), 0)
    jax.lax.fori_loop(0, count // 4, four, None)


def own(states: int):
    """Bool [STEP, STEP * N]: whether the state of column (token, state) is of the token of the row."""
    token, place = _rows_and_columns((STEP, STEP * states))
    return place // states == token


def repeats(states: int, dtype):
    """[N, STEP * N] of 0 and 1, to multiply with: every token's copy of the states."""
    state, place = _rows_and_columns((states, STEP * states))
    return (place % states == state).astype(dtype)


def _rows_and_columns(shape):
    return (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def by_state(x):
    """[STEP, N] -> [STEP, STEP * N]: numbers of a token in the columns of its states, and 0 in those of others."""
    states = x.shape[1]
    return jnp.where(own(states), dot(x, repeats(states, x.dtype)), 0).astype(x.dtype)


def of_own(x, dtype):
    """The inverse, which drops what is in the columns of others."""
    states = x.shape[1] // STEP
    return dot(jnp.where(own(states), x, 0).astype(dtype), repeats(states, dtype), LAST)


def dot(x, y, contracted=PLAIN):
    """A product with float32 sums; float32 operands are not rounded to the bfloat16 of the matrix unit."""
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def rows_of_steps(spec: Spec, count: int):
    """Scratch for `count` kinds of rows of the steps in both slots."""
    return (pltpu.VMEM((2, STEP, spec.channels), jnp.float32),) * count


def columns_of_steps(states: int):
    """Scratch for `columns` of the steps in both slots."""
    return pltpu.VMEM((2, STEP, states, LANES), jnp.float32)


def row(ref, slot: int, t: int, part: slice):
    """Token t of a step: [1, part]."""
    return ref[slot, t : t + 1, part]


def widened(column, part: slice):
    """[N, 128], whose lanes are equal, -> [N, part]."""
    return jnp.tile(column, (1, (part.stop - part.start) // LANES))


def decay(delta, base2_A, resets, t):
    """exp(Δ_t A) [N, part], 0 where the state is emptied before token t; `base2_A` is A / ln 2."""
    kept = jnp.exp2(delta * base2_A)
    return kept if resets is None else kept * (1 - resets[0, t]).astype(jnp.float32)


def in_columns(x):
    """[B, T, N] -> float32 [B, N, T]."""
    return x.swapaxes(1, 2).astype(jnp.float32)


def columns(ref, index):
    """Columns of [N, chunk] for the tokens of a step, each spread over lanes: [STEP, N, 128].

    A rotation by a number brings them to fixed lanes.
    """
    register = ref[...]
    if ref.shape[1] > LANES:
        # As shifts: divisions would be waited for.
        bits = (LANES // STEP).bit_length() - 1
        first, index = (index >> bits) * LANES, index & ((1 << bits) - 1)
        register = ref[:, pl.ds(pl.multiple_of(first, LANES), LANES)]
    rotated = pltpu.roll(register, (LANES - STEP * index) % LANES, axis=1)
    return jnp.stack([jnp.broadcast_to(rotated[:, j : j + 1], rotated.shape) for j in range(STEP)])
