"""What the TPU kernels of the selective scan take of B and C: the columns of [N, tokens], spread over lanes, and rows.

XLA's own memory has tokens on lanes, as long as there are fewer states, so that anything else would be copied for it.

A column in bfloat16 is spread in half the time, since two states share 32 bits, but then has to be converted for each
register of channels. A block of many channels has no time for that, and what it shares of the spreading it has time
for. With few the unit that spreads is the scarce one, and in between the forward, of which the vector unit is busy all
the time, takes half of either.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.tpu_blocks import LANES
from pallas_kernels.selective_scan.tpu_tile import LAST, STEP, Spec, Step, dot, rows_and_columns

# Of a block, for which the vector unit has more to do with each column than the unit that spreads it.
MANY_CHANNELS = 512
# States beyond which the forward gains nothing from columns of both kinds, by the schedules for v5e.
MOST_STATES_OF_BOTH = 32


def wide_tokens(dtype, *, channels: int, states: int) -> int:
    """`Spec.wide_tokens` where u has `dtype`, for a block of so many channels."""
    if dtype != jnp.bfloat16 or channels >= MANY_CHANNELS:
        return STEP
    return STEP // 2 if channels > LANES and states <= MOST_STATES_OF_BOTH else 0


def columns_dtype(spec: Spec, dtype):
    """Of both as the kernels take them, where u has `dtype`, but for B in the forward: `wide_tokens`."""
    return dtype if spec.packs_columns else jnp.dtype(jnp.float32)


def columns_of_steps(spec: Spec, states: int, dtype, tokens: int = STEP):
    """Scratch for `columns` of that dtype, of so many tokens of the steps in all slots; None for no token."""
    if not tokens:
        return None
    packed = dtype == jnp.bfloat16
    shape = (spec.slots, tokens, states // 2 if packed else states, LANES)
    return pltpu.VMEM(shape, jnp.uint32 if packed else jnp.float32)


def columns(registers, at: Step, tokens: range = range(STEP)) -> list:
    """Columns of each [N, 128] for tokens of a step, spread over lanes: float32 [tokens, N, 128].

    Of bfloat16 two states share 32 bits, which are kept so until they are used, since a register less is stored: uint32
    [tokens, N / 2, 128]. Columns of a token lie in the same lane of all registers, and so are spread together, by one
    pattern.

    Args:
        registers: of B or C or both, `at.whole_register`, of one dtype.
        at: the step.
        tokens: which of its tokens.
    """
    if registers[0].dtype == jnp.bfloat16:
        registers = [pltpu.bitcast(x, jnp.uint32) for x in registers]
    register, first = jnp.concatenate(registers, axis=0), at.lane
    if not isinstance(first, int):
        register, first = pltpu.roll(register, (LANES - first) % LANES, axis=1), 0
    found = [register[:, first + t : first + t + 1] for t in tokens]
    spread = jnp.stack([jnp.broadcast_to(x, register.shape) for x in found])
    return jnp.split(spread, len(registers), axis=1)


def widened(column, part: slice):
    """One of `columns`, whose lanes are equal, -> float32 [N, part]."""
    if column.dtype == jnp.uint32:
        column = pltpu.bitcast(column, jnp.bfloat16).astype(jnp.float32)
    return jnp.tile(column, (1, (part.stop - part.start) // LANES))


def rows_of_tokens(count: int, states: int):
    """Scratch for rows: of 128 tokens for `in_rows`, of a chunk for `all_in_rows`."""
    return pltpu.VMEM((count, states), jnp.float32)


def in_rows(ref, rows, at: Step):
    """Of [N, chunk], the columns of the tokens of a step -> float32 [STEP, N].

    Args:
        ref: B or C.
        rows: `rows_of_tokens`, which the first step of a trip that has its columns in a register fills for all.
        at: the step; those of a trip come in their order.
    """
    if at.is_first:
        rows[...] = ref[:, at.whole_register].astype(jnp.float32).T
    return rows[at.lanes]


def all_in_rows(ref):
    """Of [N, chunk], the columns of all tokens -> float32 [chunk, N].

    A matrix unit turns them, exactly: the unit that does it else is the one that spreads columns.
    """
    one, other = rows_and_columns((LANES, LANES))
    identity = (one == other).astype(ref.dtype)
    registers = [ref[:, i : i + LANES] for i in range(0, ref.shape[1], LANES)]
    return jnp.concatenate([dot(identity, x, LAST) for x in registers], axis=0)
