"""What the TPU kernels of the state-space-duality scan share: layout, decays and products.

Tokens lie on sublanes and channels on lanes, as the model has them, so that nothing is turned on its way in or out. The
heads of a pack lie side by side on lanes and go through a product together: with the weights of each side by side,
[t, (head, s)], the other operand has the tokens of each head below each other and its channels in their own lanes,
`block_diagonal`. A state is [N, channels]; what the tokens of a tile write is B, turned and scaled, times the same
operand, so that both are one product: rows of the weights above rows of the state.

What scales a token is wanted as a row, where tokens lie on lanes, and as a column, where they lie on sublanes. Both
come from [heads, tokens]: `rows` brings neighbouring heads side by side, and `Columns` spreads
a column over the lanes of its head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd_scan.tpu_blocks import LANES, Blocks

# Contracted dimensions of a product.
ROWS = ((0,), (0,))
PLAIN = ((1,), (0,))
LAST = ((1,), (1,))
SUBLANES = 8
LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments. `interpret`: as `pallas_call` has it."""

    blocks: Blocks
    interpret: bool | pltpu.InterpretParams


@dataclasses.dataclass(frozen=True)
class Pack:
    """Some heads of a tile: `tile` is a number, `head` that of the first head, the others are to index refs with."""

    tile: int
    head: int
    tokens: pl.Slice
    channels: pl.Slice


def packs(sizes: Blocks) -> list[Pack]:
    """Those of all tiles, tile by tile."""
    return [
        Pack(
            tile,
            head,
            pl.ds(tile * sizes.tile, sizes.tile),
            pl.ds(head * sizes.dim, sizes.pack_channels),
        )
        for tile in range(sizes.tiles)
        for head in range(0, sizes.heads, sizes.pack)
    ]


@dataclasses.dataclass(frozen=True)
class Scales:
    """What a tile multiplies its tokens with, as rows: in `row` of the first of neighbouring heads.

    Decays come from sums over the tokens of one tile: a sum over the chunk would have fewer digits where most of the
    weight is, between neighbours.

    Attributes:
        sizes: of the kernel.
        dt: [heads, (head, token)].
        total: [heads, (head, token)], the sum of dt A / ln 2 from the beginning of the tile.
        from_past: [heads, (head, token)], what is left of the state before the tile.
        to_end: [heads, (head, token)], what is left at the end of the tile of what a token writes.
        ends: [heads, (head, channel)], `total` of the last token.
        kept: [heads, (head, channel)], what is left at the end of the tile of the state before it.
    """

    sizes: Blocks
    dt: jax.Array
    total: jax.Array
    from_past: jax.Array
    to_end: jax.Array
    ends: jax.Array
    kept: jax.Array

    def row(self, name: str, head: int):
        """Of the pack that begins with `head`: [1, (head, token or channel)]."""
        width = self.sizes.dim if name in ("ends", "kept") else self.sizes.tile
        return pack_row(self.sizes, getattr(self, name), head, width)


def scales(sizes: Blocks, tile: int, dt, total, marks) -> Scales:
    """Of dt and total [heads, tokens], and `tpu.segment_marks` of the chunk or None."""
    last = (tile + 1) * sizes.tile - 1
    ends = total[:, last : last + 1]
    dt, total = (rows(sizes, tile, x) for x in (dt, total))
    from_past, to_end = total, beside(ends, sizes.tile) - total
    ends = kept = beside(ends, sizes.dim)
    if marks is not None:
        from_past += rows(sizes, tile, marks[1:2])
        to_end += rows(sizes, tile, marks[2:3])
        kept += marks[3:4, last : last + 1]
    return Scales(sizes, dt, total, *map(jnp.exp2, (from_past, to_end)), ends, jnp.exp2(kept))


def running_sums(sizes: Blocks, x, *, reverse: bool = False):
    """Sums from the beginning of each tile, or with `reverse` from its end, float32 [heads, tokens], as a product."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    ones = (i >= j if reverse else i <= j) & (i // sizes.tile == j // sizes.tile)
    registers = [x[:, first : first + LANES] for first in range(0, x.shape[1], LANES)]
    parts = _parts(jnp.concatenate(registers, axis=0))
    heads, count = x.shape[0], parts.shape[0] // 3
    sums = dot(parts, ones.astype(jnp.bfloat16), PLAIN)
    sums = sum(sums[i * count : (i + 1) * count] for i in range(3))
    return jnp.concatenate([sums[i : i + heads] for i in range(0, count, heads)], axis=1)


def _parts(x):
    """The digits of float32 [rows, 128] in three bfloat16: [3 * rows, 128]."""
    parts, rest = [], x
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16))
        rest -= wide(parts[-1])
    return jnp.concatenate(parts, axis=0)


def rows(sizes: Blocks, tile: int, x):
    """[heads, tokens] -> [heads, 128] of a tile: after the tokens of a head come those of the next."""
    first = tile * sizes.tile // LANES * LANES
    here = x[:, first : first + LANES]
    if sizes.tile == LANES:
        return here
    there = pltpu.roll(here, sizes.tile, 1)
    low, high = (there, here) if tile % 2 else (here, there)
    return jnp.where(_lane(low.shape) < sizes.tile, low, next_heads(high, 1))


def beside(x, width: int):
    """[heads, 1] -> [heads, 128]: `width` lanes of a head, then of the next."""
    x = jnp.broadcast_to(x, (x.shape[0], LANES))
    out = x
    for i in range(1, LANES // width):
        out = jnp.where(_lane(x.shape) >= i * width, next_heads(x, i), out)
    return out


def next_heads(x, count: int):
    """Row i of the result is row i + count of x, on a ring."""
    count %= x.shape[0]
    return jnp.concatenate([x[count:], x[:count]], axis=0) if count else x


def pack_row(sizes: Blocks, x, head: int, width: int):
    """Of what `rows` or `beside` made of a pack's heads: [1, (head, width)]."""
    registers, heads = max(1, width // LANES), max(1, LANES // width)
    parts = [
        x[h % x.shape[0] :][:1]
        for h in range(head, head + sizes.pack, heads)
        for _ in range(registers)
    ]
    return jnp.concatenate(parts, axis=1)


def store_row(ref, head: int, x, width: int) -> None:
    """Puts [1, (head, width)] where `pack_row` finds it; what `width` has beyond a register is summed."""
    for first in range(0, x.shape[1], max(LANES, width)):
        parts = [x[:, i : i + LANES] for i in range(first, first + max(LANES, width), LANES)]
        row = head + first // width
        ref[row : row + 1] = sum(parts)


def from_rows(sizes: Blocks, by_tile):
    """The inverse of `rows`, of all tiles: a list of [heads, 128] -> [heads, tokens]."""
    if sizes.tile == LANES:
        return jnp.concatenate(by_tile, axis=1)
    registers = []
    for even, odd in zip(by_tile[::2], by_tile[1::2], strict=True):
        is_low = _lane(even.shape) < sizes.tile
        first = jnp.where(is_low, even, pltpu.roll(odd, sizes.tile, 1))
        second = jnp.where(is_low, pltpu.roll(even, sizes.tile, 1), odd)
        head = jax.lax.broadcasted_iota(jnp.int32, even.shape, 0)
        registers.append(jnp.where(head % 2 == 0, first, next_heads(second, -1)))
    return jnp.concatenate(registers, axis=1)


def column(x):
    """[1, tokens] -> [tokens, 1]."""
    return jnp.broadcast_to(x, (SUBLANES, x.shape[1])).T[:, :1]


class Columns:
    """[heads, tokens], whose numbers are wanted in columns."""

    def __init__(self, sizes: Blocks, x, *, on_matrix_unit: bool):
        self.sizes, self.x, self.on_matrix_unit = sizes, x, on_matrix_unit
        self._of_register = functools.cache(self._of_register)
        self._turned = functools.cache(self._turned)

    def spread(self, tile: int, head: int, width: int):
        """Those of a pack that begins with `head`, each over `width` lanes: [token, (head, width)]."""
        sizes, first = self.sizes, tile * self.sizes.tile
        if self.on_matrix_unit:
            numbers = self._of_register(first // LANES, width)[first % LANES :][: sizes.tile]
            return numbers[:, head * width : (head + sizes.pack) * width]
        column, parts = self._turned()[first : first + sizes.tile], []
        for i in range(0, sizes.pack * width, LANES):
            place = (_lane(column.shape) + i) // width + head
            parts.append(jnp.take_along_axis(column, place, axis=1, mode="promise_in_bounds"))
        return jnp.concatenate(parts, axis=1)

    def _turned(self):
        """[tokens, 128], with a head in each lane."""
        return jnp.pad(self.x.T, ((0, 0), (0, LANES - self.x.shape[0])))

    def _of_register(self, register: int, width: int):
        """[128 tokens, (head, width)] on the matrix unit, which takes a number in three parts."""
        parts = _parts(self.x[:, register * LANES : (register + 1) * LANES])
        heads = self.x.shape[0]
        shape = (3 * heads, heads * width)
        head, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        is_own = (head % heads == lane // width).astype(jnp.bfloat16)
        return dot(parts, is_own, ROWS)


def _lane(shape):
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def block_diagonal(sizes: Blocks, x):
    """[token, (head, channel)] -> [(head, token), (head, channel)], 0 for two different heads."""
    if sizes.pack == 1:
        return x
    bits = pltpu.bitcast(x, jnp.uint32)
    head = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1) // sizes.dim
    by_head = [jnp.where(head == h, bits, 0) for h in range(sizes.pack)]
    return pltpu.bitcast(jnp.concatenate(by_head, axis=0), x.dtype)


def repeated(sizes: Blocks, x):
    """[token, N] -> [(head, token), N], the same for each head."""
    return jnp.concatenate([x] * sizes.pack, axis=0)


def causal(sizes: Blocks, tile: int, marks, *, reading_on_rows: bool):
    """Bool [token i, (head, token j)]: whether the reading token sees the writing one, of its segment and not after it.

    Reading tokens are i if `reading_on_rows`, or else j.
    """
    shape = (sizes.tile, sizes.pack_tokens)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    j %= sizes.tile
    order = j <= i if reading_on_rows else i <= j
    if marks is None:
        return order
    segment = pack_row(sizes, rows(sizes, tile, marks[0:1]), 0, sizes.tile)
    return order & (column(segment)[: sizes.tile] == segment)


def similarity(sizes: Blocks, x, y):
    """x_i · y_j, float32 [token i, (head, token j)], and below it y turned, [N, (head, token j)]: one product."""
    y = repeated(sizes, y)
    return dot(x, y, LAST), wide(y.T)


def decay(is_seen, exponent):
    """2 ** exponent, 0 for what is not seen, where it may be large."""
    return jnp.exp2(jnp.where(is_seen, exponent, -jnp.inf))


def wide(x):
    return x.astype(jnp.float32)


def dot(x, y, contracted):
    """A product with float32 sums; float32 operands are not rounded to the bfloat16 of the matrix unit."""
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
