"""How much of the state-space-duality scan a TPU core takes at a time."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp

from pallas_kernels.blocks import Shape, Sizes, Table

LANES = 128
# Tokens whose weights are computed at once.
TILE = LANES
# Rows of a bfloat16 register: a head is cut out of the heads of a block at whole registers.
ROWS = 16
# Channels (heads x P) of a grid step. More amortise the grid, fewer keep the unrolled heads short.
MAX_CHANNELS = 512
# The weights of a chunk are [chunk, chunk] in several copies.
MAX_CHUNK = 512
# The state of all heads of a group stays in VMEM, beside the blocks of a step.
VMEM_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes.

    Attributes:
        chunk: tokens a chunk, a multiple of 128.
        heads: heads a grid step; heads x dim is a multiple of 128.
        per_group: heads a group, filled up to whole grid steps.
        dim: P, filled up to whole registers.
    """

    chunk: int
    heads: int
    per_group: int
    dim: int

    @property
    def channels(self) -> int:
        """Channels of a grid step."""
        return self.heads * self.dim

    @property
    def steps(self) -> int:
        """Grid steps that the heads of a group take."""
        return self.per_group // self.heads


def _flaw(sizes: Sizes, shape: Shape) -> str | None:
    chunk, heads = sizes["chunk"], sizes["heads"]
    if chunk % TILE or chunk > MAX_CHUNK:
        return f"chunk={chunk} is no multiple of {TILE} up to {MAX_CHUNK}"
    if chunk > max(TILE, shape["time"]):
        return f"chunk={chunk} is more tokens than there are, {shape['time']}"
    if shape["per_group"] % heads:
        return f"heads={heads} does not divide the heads of a group, {shape['per_group']}"
    if heads * shape["dim"] % LANES:
        return f"heads={heads} of {shape['dim']} channels are no multiple of {LANES}"
    return None


# Its shapes have `per_group` and `dim` filled up.
TABLE = Table(
    path=Path(__file__).with_name("blocks.json"),
    lengths=("time",),
    others=("per_group", "dim", "states", "dtype"),
    sizes=("chunk", "heads"),
    flaw=_flaw,
)


def blocks(
    device_kind: str,
    *,
    time: int,
    per_group: int,
    dim: int,
    states: int,
    dtype,
    chunk_size: int | None = None,
) -> Blocks:
    """Sizes for `time` tokens and `per_group` heads a group of `dim` channels with `states` each, by table or rule.

    Work inside a chunk grows with its length, traffic of states and the price of a grid step shrink with it. By their
    schedules, 256 tokens take fewer cycles than twice 128 in bfloat16 on v5e and v6e, forward and backward. A float32
    product takes six of bfloat16, so that the matrix unit bounds the kernels and less work inside a chunk is better.
    `chunk_size` is rounded up to whole registers.
    """
    by_rule = chunk_size
    if by_rule is None:
        by_rule = 2 * LANES if dtype == jnp.bfloat16 else LANES
    whole = _round_up(time, LANES)
    chunk = min(_round_up(by_rule, LANES), whole)
    dim = _round_up(dim, ROWS)
    fewest = LANES // math.gcd(LANES, dim)
    per_group = _round_up(per_group, fewest)
    heads = max(
        heads
        for heads in range(fewest, per_group + 1, fewest)
        if per_group % heads == 0 and (heads * dim <= MAX_CHANNELS or heads == fewest)
    )
    if chunk_size is None:
        sizes = TABLE.choose(
            device_kind,
            {"chunk": chunk, "heads": heads},
            time=time,
            per_group=per_group,
            dim=dim,
            states=states,
            dtype=jnp.dtype(dtype).name,
        )
        # Of a bucket of lengths the table has the sizes of the longest.
        chunk, heads = min(sizes["chunk"], whole), sizes["heads"]
    return Blocks(chunk, heads, per_group, dim)


def vmem_bytes(sizes: Blocks, states: int, dtype) -> int:
    """Of the backward, which needs most: blocks are double-buffered, states have whole registers of lanes."""
    itemsize = jnp.dtype(dtype).itemsize
    states = _round_up(states, LANES)
    tokens = 2 * 3 * sizes.chunk * sizes.channels * itemsize + 2 * 5 * sizes.chunk * states * 4
    state = (sizes.steps * 4 + 2 * 2 * 4 + 2 * itemsize + 3 * 4) * sizes.channels * states
    temporaries = 8 * sizes.chunk * sizes.channels * 4 + 8 * sizes.chunk**2 * 4
    return tokens + state + temporaries


def _round_up(x: int, multiple: int) -> int:
    return x + -x % multiple
