"""What the TPU kernels of the selective scan share: block sizes, layout, and the pieces of one step in time.

Channels lie on lanes. A state is [N, channels], so that the step Δ_t and the input u_t of a token are rows, which
spread over the sublanes of a state as they are loaded. B_t and C_t are columns of [N, T] and have to be spread over
lanes; a block of many channels shares that work.

The vector unit has most to do, so that sums over the states or the channels of a token are left to the matrix unit: the
states of several tokens below each other are one operand, and of each token only its own place in the product counts:
those of `STEP` tokens, or of a group of them (`Spec.group`), of which a product has fewer rows. A matrix unit takes the
rows of this operand tile by tile, and a tile from its last row up. So the token that comes first lies last in its tile
(`place_of`): its states leave the registers at once, which else spill what waits for its turn.
"""

import dataclasses
import math

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
# Rows of an operand that a matrix unit takes one after the other, the last first, by the schedules for v5e and v6e.
ROWS_OF_A_TILE = 128
LOG2_E = 1.4426950408889634
# Blocks of a chunk in the backward, rows of it and what is spilled take 14 MiB for 1024 tokens of 768 channels in
# bfloat16 with gate and skip. Float32 products, whose operands the compiler splits, spill more: it is 46 for 512 tokens
# of 512 channels of 64 states.
VMEM_LIMIT = 56 * 2**20
# Steps in a trip of a loop, at least: in the backward a slot is filled as the step before its own begins, and is still
# read when the second one after it has begun.
LEAST_STEPS = 4
# Steps that may be at hand, which each have a slot: the more, the freer the compiler is to begin one early.
MOST_SLOTS = 16
# Steps whose columns are in one register.
STEPS_OF_A_REGISTER = LANES // STEP
# Channels whose states are in registers together.
MOST_IN_REGISTERS = 2 * LANES


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments.

    Attributes:
        channels: channels a block, a multiple of 128.
        chunk: tokens a grid step, a multiple of 128: B and C have tokens on lanes.
        unrolled: steps in a trip of the loop over a chunk's, a power of two that divides their number; that of the
            forward, of which the backward makes its own.
        matrix_width: rows and columns of a matrix unit, 128 or 256.
        narrow: whether what only goes into sums is bfloat16 in the vector unit of the backward, too.
        wide_tokens: of a step, the first so many, of which the forward spreads columns of B in float32.
        has_state: whether there is a state before the first token that is not 0.
        interpret: as `pallas_call` has it.
    """

    channels: int
    chunk: int
    unrolled: int
    matrix_width: int
    narrow: bool
    wide_tokens: int
    has_state: bool
    interpret: object

    @property
    def slots(self) -> int:
        """Steps that may be at hand."""
        return min(MOST_SLOTS, self.unrolled)

    @property
    def packs_columns(self) -> bool:
        """Whether columns of bfloat16 are spread as such, all of them or, in the forward, some."""
        return self.wide_tokens < STEP

    @property
    def whole_registers(self) -> bool:
        """Whether it is known when a loop is compiled where in a register a step of a trip has its columns.

        Else they are rotated to lanes that are, which is waited for.
        """
        return self.unrolled % STEPS_OF_A_REGISTER == 0

    @property
    def sums_lanes(self) -> bool:
        """Whether sums over channels begin in the vector unit, in bfloat16, of the parts of a block together."""
        return self.narrow and self.channels > self.matrix_width

    def group(self, states: int) -> int:
        """Tokens of a step that a product over states takes together: as few as fill tiles of a matrix unit, since of
        its rows only theirs count, or else all.
        """
        return SUBLANES if SUBLANES * states % self.matrix_width == 0 else STEP

    def parts(self, most: int = MOST_IN_REGISTERS) -> list[slice]:
        """Of a block, the channels that go through a step in time together, beside what it needs of them.

        A block has more, so that its parts share the columns of B and C.
        """
        starts = range(0, self.channels, most)
        return [slice(i, min(i + most, self.channels)) for i in starts]


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
        self.pasts = pl.BlockSpec(
            (None, spec.chunk // STEP, states, spec.channels),
            lambda b, e, c: (b, chunk_of(c), 0, e),
        )
        # Sums over the channels of a block only.
        self.partial_columns = pl.BlockSpec(
            (None, None, states, spec.chunk), lambda b, e, c: (b, e, 0, chunk_of(c))
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a chunk.

    Attributes:
        index: its number, which may be known at run time only.
        slot: where a stage leaves what it has to the next.
        is_first: whether it is the first of its trip with columns in its register.
        lane: of its first token in that register.
    """

    index: object
    slot: int
    is_first: bool
    lane: object

    @property
    def tokens(self):
        """Its tokens, to index refs with."""
        return pl.ds(pl.multiple_of(STEP * self.index, STEP), STEP)

    @property
    def lanes(self):
        """Of its tokens in the register of its columns, to index refs with that have them as rows."""
        known = isinstance(self.lane, int)
        return pl.ds(self.lane if known else pl.multiple_of(self.lane, STEP), STEP)

    @property
    def whole_register(self):
        """All tokens of the register of its columns, to index refs with."""
        return pl.ds(pl.multiple_of(STEP * self.index - self.lane, LANES), LANES)


def lane_of(index):
    """Of the first token of a step; modulo `STEPS_OF_A_REGISTER` its index will do."""
    return STEP * index % LANES


def step_of(spec: Spec, index, place: int, lane) -> Step:
    """A step of the index, at its place in a trip."""
    is_first = place % min(spec.unrolled, STEPS_OF_A_REGISTER) == 0
    return Step(index, place % spec.slots, is_first, lane)


def for_each_step(spec: Spec, prepare, advance) -> None:
    """Takes the steps of a chunk through its stages, each called with a `Step`.

    A step is prepared before the one ahead of it advances, since products and columns take long to come back. As many
    steps as `spec` says are unrolled: at the end of a trip the last products are waited for.
    """
    count = spec.chunk // STEP

    def at(trip, place):
        # After the last comes the first again, for nothing.
        index = (spec.unrolled * trip + place) % count
        return step_of(spec, index, place, lane_of(place if spec.whole_registers else index))

    def trip(i, _):
        for place in range(spec.unrolled):
            prepare(at(i, place + 1))
            advance(at(i, place))

    prepare(at(0, 0))
    jax.lax.fori_loop(0, count // spec.unrolled, trip, None)


def place_of(token, states: int, group: int, *, reverse: bool = False):
    """Where in a stack those of a token are, and which token's are at a place: its own inverse.

    Args:
        token: 0 to group - 1.
        states: N.
        group: tokens of the stack.
        reverse: whether the last token comes first.
    """
    in_a_tile = 1 << (max(1, ROWS_OF_A_TILE // states).bit_length() - 1)
    return token ^ (min(in_a_tile, group) - 1) ^ (group - 1 if reverse else 0)


def stack(of_tokens: list):
    """[N, part] of each token of a step or of a group, in the order in which they came -> [tokens * N, part]."""
    count, states = len(of_tokens), of_tokens[0].shape[0]
    return jnp.concatenate([of_tokens[place_of(i, states, count)] for i in range(count)], axis=0)


def stacks(of_tokens: list, group: int) -> list:
    """The stack of each group of tokens of a step."""
    return [stack(of_tokens[i : i + group]) for i in range(0, STEP, group)]


def tiles(of_tokens: list, rows: int) -> list:
    """The stack of tokens, cut into tiles of `rows`, or whole where the states of tokens do not fill them."""
    states = of_tokens[0].shape[0]
    return stacks(of_tokens, rows // states if rows % states == 0 else STEP)


def own(states: int, group: int, *, reverse: bool = False):
    """Bool [group, group * N]: whether the state of a column of a group's stack is of the token of the row."""
    token, column = rows_and_columns((group, group * states))
    return column // states == place_of(token, states, group, reverse=reverse)


def repeats(states: int, group: int, dtype):
    """[N, group * N] of 0 and 1, to multiply with: every token's copy of the states."""
    state, column = rows_and_columns((states, group * states))
    return (column % states == state).astype(dtype)


def sums(states: int, group: int, *, reverse: bool = False):
    """[group + N, group * N] of 0 and 1, to multiply a stack with: its sums over states, and those over tokens."""
    of_states = own(states, group, reverse=reverse).astype(jnp.float32)
    return jnp.concatenate([of_states, repeats(states, group, jnp.float32)], axis=0)


def rows_and_columns(shape):
    """Of each entry of a matrix, its row and its column: two int32 matrices."""
    return (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def by_state(x, group: int, *, rounded: bool, reverse: bool = False):
    """Float32 [STEP, N] -> [STEP, group * N]: numbers of a token in the columns of its states, and 0 in those of others
    of its group. `rounded`: as `dot` has it, for numbers of bfloat16.
    """
    spread = dot(x, repeats(x.shape[1], group, x.dtype), rounded=rounded)
    return of_own(spread, group, reverse=reverse)


def of_own(x, group: int, *, reverse: bool = False):
    """[STEP, group * N] of a step without what is in the columns of other tokens of its group."""
    of_token = own(x.shape[1] // group, group, reverse=reverse)
    of_groups = [jnp.where(of_token, x[i : i + group], 0) for i in range(0, STEP, group)]
    return jnp.concatenate(of_groups, axis=0)


def in_columns_of_own(x):
    """The inverse of `by_state` of whole steps: [128, STEP * N] -> [N, 128]."""
    return dot(repeats(x.shape[1] // STEP, STEP, x.dtype), x, LAST)


def over_states(rows, at: Step, of_tokens: list, *, rounded: bool):
    """Sums over the states of each token of a step, times the numbers that `by_state` has of it: float32 [STEP, part].

    Args:
        rows: ref of `by_state` of the steps in all slots, in tiles.
        at: the step.
        of_tokens: [N, part] of each token, the first first.
        rounded: as `dot` has it.
    """
    group = rows.shape[1] * rows.shape[3] // of_tokens[0].shape[0]
    of_groups = zip(range(0, STEP, group), stacks(of_tokens, group), strict=True)
    products = [
        dot(read_tiles(rows, at.slot, pl.ds(i, group)), x, rounded=rounded) for i, x in of_groups
    ]
    return jnp.concatenate(products, axis=0)


def dot(x, y, contracted=PLAIN, *, rounded: bool = False):
    """A product with float32 sums.

    Args:
        x: one operand, converted to the dtype of the other.
        y: the other.
        contracted: dimensions.
        rounded: whether the matrix unit may round float32 operands to its bfloat16: it takes them as they are, which
            spares the vector unit the conversion.
    """
    precision = "highest" if y.dtype == jnp.float32 and not rounded else "default"
    return jax.lax.dot_general(
        x.astype(y.dtype),
        y,
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def rows_of_steps(spec: Spec, dtype=jnp.float32):
    """Scratch for rows of the steps in all slots."""
    return pltpu.VMEM((spec.slots, STEP, spec.channels), dtype)


def states_of_steps(spec: Spec, states: int, dtype, group: int):
    """Scratch in tiles for `by_state` of the steps in all slots."""
    return _in_tiles(spec, spec.slots, STEP, group * states, dtype)


def states_of_registers(spec: Spec, count: int, states: int, dtype):
    """Scratch in tiles for `of_own` of all steps with their columns in one of some registers."""
    return _in_tiles(spec, count, LANES, STEP * states, dtype)


def _in_tiles(spec: Spec, count: int, rows: int, columns: int, dtype):
    width = math.gcd(columns, spec.matrix_width)
    return pltpu.VMEM((count, columns // width, rows, width), dtype)


def write_tiles(ref, index, x, rows=slice(None)):
    """Float32 [rows, columns] to rows of ref[index], which is [tiles, rows of it, columns of a tile]: as wide as a
    matrix unit, if it can be, so that on v5e 16 rows of bfloat16 are a register in memory, too, and not halves of two.
    """
    width = ref.shape[3]
    for i in range(ref.shape[1]):
        ref[index, i, rows] = x[:, width * i : width * (i + 1)].astype(ref.dtype)


def read_tiles(ref, index, rows=slice(None)):
    """The inverse of `write_tiles`."""
    return jnp.concatenate([ref[index, i, rows] for i in range(ref.shape[1])], axis=1)


def row(ref, at: Step, t: int, part: slice):
    """Token t of a step: [1, part]."""
    return ref[at.slot, t : t + 1, part]


def in_lanes(x):
    """[N, part] -> [N, 128], the sums of channels that lie in the same lane."""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def decay(exponent, resets, at: Step, t: int):
    """2 ** exponent [N, part], 0 where the state is emptied before token t of a step; the exponent is Δ_t A / ln 2."""
    kept = jnp.exp2(exponent)
    if resets is None:
        return kept
    return kept * (1 - resets[0, STEP * at.index + t]).astype(jnp.float32)
