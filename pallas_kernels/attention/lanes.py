"""How heads lie side by side in the lanes of the TPU kernels' arrays, which are as projections leave them.

[B, T, H, D] is [B, T, H * D] in memory, and that is what the kernels read and write: a program takes the lanes of one
key head and of the query heads that share it, which follow each other. A head of 128 lanes or a multiple is a block of
its own. Heads of up to 64 lanes go in twos, since blocks are of 128 lanes: a program takes two key heads, the "sides"
of its blocks, and all of their query heads. A product over 128 lanes of which one operand has zeros in the half of the
other head is a product of one head, and takes a matrix unit, 128 wide, no longer than one over 64 lanes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.blocks import (
    DQ_BYTES,
    LANES,
    LONGEST,
    WIDEST_GROUP,
    dq_bytes,
    heads_together,
    width,
)
from pallas_kernels.blocks import largest_divisor

HALF = LANES // 2


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of a program, one of the grid's axis over heads.

    Its block of k is `abreast` blocks of `keys_width` lanes with `sides` key heads each, and the query heads that read
    one of these are `group` such blocks of q.

    Attributes:
        programs: along that axis.
        group: query heads of a key head.
        sides: key heads that share the lanes of a block, 1 or 2.
        abreast: blocks of k.
        keys_width: lanes of a block of k.
        values_width: lanes of a block of v.
        is_odd: whether the last program has one key head only; what lies in place of the other's is undefined.
    """

    programs: int
    group: int
    sides: int
    abreast: int
    keys_width: int
    values_width: int
    is_odd: bool

    @property
    def blocks(self) -> int:
        """Blocks of q."""
        return self.abreast * self.group

    @property
    def queries(self) -> int:
        """Query heads."""
        return self.sides * self.blocks

    def query_head(self, index, side):
        """The query head of a side: `index`, below `blocks`, counts those that read the same side of any block of k."""
        if self.sides == 1:
            return index
        return (index // self.group * 2 + side) * self.group + index % self.group

    def index_and_side(self, head):
        """The inverse of `query_head`."""
        pair, rest = head // (2 * self.group), head % (2 * self.group)
        return pair * self.group + rest % self.group, rest // self.group


def heads_of(q, k, v) -> Heads:
    """For q [B, Tq, H, D], k [B, Tk, Hkv, D] and v [B, Tk, Hkv, Dv]."""
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    widths = [-(-x.shape[3] // LANES) * LANES for x in (k, v)]
    itemsize, lengths = q.dtype.itemsize, (q.shape[1], k.shape[1])
    wide = width(max(widths), itemsize)
    is_half = max(k.shape[3], v.shape[3]) <= HALF
    sides = 2 if is_half and kv_heads > 1 and 2 * group * wide <= WIDEST_GROUP else 1
    is_odd = kv_heads % sides != 0
    # A wait of one head is filled by another: as many as there is room for.
    longest = (min(length, LONGEST * 2 // itemsize) for length in lengths)
    room = heads_together(*longest, itemsize) // (wide * sides * group)
    room = min(room, DQ_BYTES // (dq_bytes(group * widths[0], itemsize) * lengths[0]))
    num_blocks = -(-kv_heads // sides)
    abreast = 1 if is_odd else largest_divisor(num_blocks, room)
    return Heads(num_blocks // abreast, group, sides, abreast, *widths, is_odd)


# In HBM.


def side_by_side(x, head_lanes: int, block: int):
    """[B, T, H, D] -> [B, T padded, H * head_lanes], T padded to a multiple of `block`."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, head_lanes - dim)))
    return x.reshape(batch, -1, heads * head_lanes)


def of_programs(heads: Heads, x, block: int):
    """[B, T, H] -> [B, programs, query heads of one, T padded], T padded to a multiple of `block`."""
    batch, length, count = x.shape
    missing = heads.programs * heads.queries - count
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, missing), (0, -length % block)))
    return x.reshape(batch, heads.programs, heads.queries, -1)


def apart(x, length: int, heads: int, dim: int):
    """[B, T padded, H * head_lanes] -> [B, T, H, D]."""
    return x.reshape(*x.shape[:2], heads, -1)[:, :length, :, :dim]


# In a kernel.


def each(count: int, together: int = 1):
    """Runs a function for 0, 1, ..., count - 1, of which it takes `together` a time as a sequence."""
    if count == together:
        return lambda function: function(range(count))
    return lambda function: pl.loop(0, count, step=together)(
        lambda first: function([first + i for i in range(together)])
    )


def block(index, lanes: int) -> pl.Slice:
    """The lanes of block `index`."""
    return pl.ds(pl.multiple_of(index * lanes, LANES), lanes)


def merged(by_side):
    """The half of each side, [rows, 128 or 1] each, -> [rows, 128]; of one side all lanes."""
    if len(by_side) == 1:
        return by_side[0]
    lower, upper = by_side
    return jnp.where(_lane() < HALF, lower, upper)


def only(x, side):
    """[rows, 128] with zeros in the half of the other side."""
    return jnp.where(_lane() // HALF == side, x.astype(jnp.float32), 0).astype(x.dtype)


def swapped(x):
    """[rows, 128] with its halves in the other order."""
    return pltpu.roll(x.astype(jnp.float32), HALF, 1).astype(x.dtype)


def place_queries(heads: Heads, q, placed) -> None:
    """q [queries, lanes of its blocks] -> placed [heads, queries, 128], each in the half of its key head."""

    @each(heads.blocks)
    def _(indices):
        (index,) = indices
        x = q[:, block(index, LANES)]
        for half in range(2):
            head = 2 * index + half
            _, side = heads.index_and_side(head)
            placed[head] = only(_if_not_there(heads, x, half, side), side)


def take_queries(heads: Heads, placed, out) -> None:
    """placed [blocks, queries, 128], where both sides of an index are, -> out [queries, lanes of its blocks]."""

    @each(heads.blocks)
    def _(indices):
        (index,) = indices
        halves = []
        for half in range(2):
            at, side = heads.index_and_side(2 * index + half)
            halves.append(_if_not_there(heads, placed[at], half, side))
        out[:, block(index, LANES)] = merged(halves).astype(out.dtype)


def place_keys(x, placed) -> None:
    """The two key heads in x [keys, 128] -> placed[side, half], key head `side` in that half and zeros beside it."""
    for side in range(2):
        there = only(x, side)
        placed[side, side] = there
        placed[side, 1 - side] = swapped(there)


def take_keys(placed):
    """[keys, 128] with each key head's sum of what `placed[side, half]` has in `half`; of one side all lanes."""
    if placed.shape[0] == 1:
        return placed[0, 0]
    return merged((placed[0, 0], placed[1, 1])) + swapped(merged((placed[1, 0], placed[0, 1])))


def _if_not_there(heads: Heads, x, half, side):
    """Moves what is in `half` of x to the half `side`."""
    # With one query head for a key head it is there already.
    return x if heads.group == 1 else jnp.where(half == side, x, swapped(x))


def _lane():
    return jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
