"""What the TPU kernels of the state-space-duality scan share: layout, decays and products.

Tokens lie on sublanes and channels on lanes, as the model has them, so that nothing is turned on its way in or out; B
and C, which are wanted either way, come as XLA has them, `States`. The heads of a pack lie side by side on lanes and go
through a product together: with the weights of each side by side, [t, (head, s)], the other operand has the tokens of
each head below each other and its channels in their own lanes, `block_diagonal`. A state is [N, channels]; what the
tokens of a tile write is B, turned and scaled, times the same operand, so that both are one product: rows of the state
and rows of the weights.

What scales a token is wanted as a row, where tokens lie on lanes, and as a column, where they lie on sublanes. Both
come from [(register, head), 128 tokens], `Registers`: `rows` brings neighbouring heads side by side, and `Columns`
spreads a column over the lanes of its head. What heads share, as C · B, is computed for the heads of one register; a
second register of the pack is the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd_scan.tpu_blocks import LANES, SUBLANES, Blocks
from pallas_kernels.tpu_dot import dot

# Contracted dimensions of a product.
PLAIN = ((1,), (0,))
LAST = ((1,), (1,))
LOG2_E = 1.4426950408889634
# The exponent of what is 0 in float32. Less would only cost the sums with it their digits.
NOTHING = -150.0
# As many packs of all tiles go through their stages all together: there are no others to fill their waits.
FEW = 8
# Instead of dt = 0, which has no logarithm: what a token with it writes is lost in rounding.
LEAST_STEP = 2.0**-60


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments.

    Attributes:
        blocks: sizes.
        has_state: whether there is a state before the first token that is not 0.
        interpret: as `pallas_call` has it.
    """

    blocks: Blocks
    has_state: bool
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
class Registers:
    """`Blocks.together` times 128 tokens: what decays and scales them, float32 [(register, head), 128 tokens], of the
    heads of a grid step.

    Attributes:
        step: dt.
        total: the sum of dt A / ln 2 from the beginning of the tile. A sum over the chunk would have fewer digits where
            most of the weight is, between neighbours.
        written: total - log2 dt: what a token writes is its x times 2 ** (total of the reader - this), one
            product less. It has the digits of the total: a gradient is exact to 2 ** -24 of that.
        marks: of `tpu.segment_marks` those to add to exponents; None: one segment.
    """

    step: jax.Array
    total: jax.Array
    written: jax.Array
    marks: list[jax.Array] | None


def all_registers(sizes: Blocks, dt, totals, marks) -> list[Registers]:
    """Those of a chunk, of refs dt [heads, tokens] and marks [4, tokens], and `Registers.total` of each."""
    of_all = []
    for group, total in enumerate(totals):
        step = jnp.maximum(stacked(sizes, dt, group), LEAST_STEP)
        of_tokens = None
        if marks is not None:
            of_tokens = [stacked(sizes, marks, group, row) for row in range(1, marks.shape[0])]
        of_all.append(Registers(step, total, total - jnp.log2(step), of_tokens))
    return of_all


def totals(sizes: Blocks, dt, A, dtype) -> list[jax.Array]:
    """`Registers.total` of all, of refs dt [heads, tokens] and A [heads, 128], for x of `dtype`.

    A matrix unit has to be given the ones of running sums for each product. On wide units, of which there are few, it
    is one; of others there are more, and the first product of several is done sooner.
    """
    rates = jnp.concatenate([A[...] * LOG2_E] * sizes.together)
    of_all = []
    at_once = sizes.groups if sizes.on_matrix_unit else 1
    for first in range(0, sizes.groups, at_once):
        groups = range(first, min(first + at_once, sizes.groups))
        exponents = jnp.concatenate([stacked(sizes, dt, group) * rates for group in groups])
        exponents = jnp.maximum(exponents, NOTHING)
        of_all += jnp.split(running_sums(exponents, sizes.tile, dtype), len(groups))
    return of_all


def stacked(sizes: Blocks, ref, group: int, row: int | None = None):
    """A group's part of a ref [heads, tokens], or of its `row` for all heads: [(register, head), 128 tokens]."""
    parts = []
    for number in range(group * sizes.together, (group + 1) * sizes.together):
        lanes = pl.ds(number * LANES, LANES)
        part = ref[:, lanes] if row is None else ref[row : row + 1, lanes]
        parts.append(jnp.broadcast_to(part, (sizes.heads, LANES)))
    return jnp.concatenate(parts)


def heads_of(sizes: Blocks, x, register: int):
    """Of a group's [(register, head), 128] -> [heads, 128]."""
    return x[register % sizes.together * sizes.heads :][: sizes.heads]


@dataclasses.dataclass(frozen=True)
class Scales:
    """What tiles multiply their tokens with, those at one place of each of some registers, as rows [(register, head),
    128]: in the row of the first of neighbouring heads.

    Attributes:
        sizes: of the kernel.
        total: of (head, token), as of its register; so is written.
        from_past: of (head, token), what is left of the state before the tile.
        to_end: of (head, token), dt times what is left at the end of the tile of what a token writes.
        ends: of (head, channel), `total` of the last token.
        kept: of (head, channel), what is left at the end of the tile of the state before it.
    """

    sizes: Blocks
    total: jax.Array
    written: jax.Array
    from_past: jax.Array
    to_end: jax.Array
    ends: jax.Array
    kept: jax.Array

    def row(self, name: str, pack: Pack):
        """Of a pack: [1, (head, token or channel)]."""
        width = self.sizes.dim if name in ("ends", "kept") else self.sizes.tile
        of_all = heads_of(self.sizes, getattr(self, name), pack.tile * self.sizes.tile // LANES)
        return pack_row(self.sizes, of_all, pack.head, width)


def scales(sizes: Blocks, place: int, of: Registers) -> Scales:
    """Of the tiles that are number `place` of their registers."""
    last = (place + 1) * sizes.tile - 1
    ends = of.total[:, last : last + 1]
    total, written = (rows(sizes, place, x) for x in (of.total, of.written))
    from_past, to_end = total, beside(ends, sizes.tile) - written
    ends = kept = beside(ends, sizes.dim)
    if of.marks is not None:
        of_past, of_end, of_kept = of.marks
        from_past += rows(sizes, place, of_past)
        to_end += rows(sizes, place, of_end)
        kept += of_kept[:, last : last + 1]
    from_past, to_end, kept = map(jnp.exp2, (from_past, to_end, kept))
    return Scales(sizes, total, written, from_past, to_end, ends, kept)


def running_sums(x, tile: int, dtype, *, reverse: bool = False):
    """Sums from the beginning of each tile, or with `reverse` from its end, float32 [rows, 128], as a product.

    What x has beyond 128 lanes is in all of them. Where `dtype`, that of the weights which come of it, has 8 digits, 16
    of each summand are enough.
    """
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (x.shape[1], LANES), axis) for axis in (0, 1))
    ones = (i >= j if reverse else i <= j) & (i // tile == j // tile) | (i >= LANES)
    count = _num_parts(dtype)
    return sum(jnp.split(dot(_parts(x, count), ones.astype(jnp.bfloat16), PLAIN), count))


def sums_in_row(x, dtype):
    """Sums over lanes, as a product, which has them side by side: float32 [rows, 128] -> [1, rows].

    Of the digits of x there are as many as in `running_sums`.
    """
    parts = _parts(x, _num_parts(dtype), axis=1)
    return dot(jnp.ones((SUBLANES, parts.shape[1]), parts.dtype), parts, LAST)[:1]


def _num_parts(dtype) -> int:
    return 2 if dtype == jnp.bfloat16 else 3


def _parts(x, count: int, axis: int = 0):
    """The digits of float32 [rows, 128] in bfloat16, of which three have all, one after the other along `axis`."""
    parts, rest = [], x
    for _ in range(count):
        parts.append(rest.astype(jnp.bfloat16))
        rest -= wide(parts[-1])
    return jnp.concatenate(parts, axis=axis)


def rows(sizes: Blocks, place: int, x):
    """The tile at `place` of registers [heads, 128] -> [heads, 128]: tokens of a head, then those of the next."""
    if sizes.tile == LANES:
        return x
    there = pltpu.roll(x, sizes.tile, 1)
    low, high = (there, x) if place else (x, there)
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
    """The inverse of `rows`, of the tiles of a register: a list of [heads, 128] -> [heads, 128 tokens]."""
    if sizes.tile == LANES:
        return by_tile[0]
    even, odd = by_tile
    is_low = _lane(even.shape) < sizes.tile
    first = jnp.where(is_low, even, pltpu.roll(odd, sizes.tile, 1))
    second = jnp.where(is_low, pltpu.roll(even, sizes.tile, 1), odd)
    head = jax.lax.broadcasted_iota(jnp.int32, even.shape, 0)
    return jnp.where(head % 2 == 0, first, next_heads(second, -1))


def over_heads(sizes: Blocks, by_tile):
    """Sums over the heads of a register, of the tiles of one: a list of [rows, (head, token)] -> [rows, 128 tokens]."""
    if sizes.tile == LANES:
        return by_tile[0]
    even, odd = by_tile
    is_low = _lane(even.shape) < sizes.tile
    return jnp.where(is_low, even, odd) + pltpu.roll(jnp.where(is_low, odd, even), sizes.tile, 1)


def column(x):
    """[1, tokens] -> [tokens, 1]."""
    return jnp.broadcast_to(x, (SUBLANES, x.shape[1])).T[:, :1]


class Columns:
    """[(register, head), 128 tokens], whose numbers are wanted in columns."""

    def __init__(self, sizes: Blocks, x):
        self.sizes = sizes
        # [tokens, (register, head)], on the matrix unit a number in three parts.
        self._turned = _parts(x, 3).T if sizes.on_matrix_unit else _fill_lanes(x.T)
        self._spread_all = functools.cache(self._spread_all)

    def of_pack(self, pack: Pack):
        """Those of a pack over lanes for each head and token, and over lanes for each head and channel."""
        sizes = self.sizes
        for_tokens = self.spread(pack.tile, pack.head, sizes.tile)
        is_same = sizes.dim == sizes.tile
        return for_tokens, for_tokens if is_same else self.spread(pack.tile, pack.head, sizes.dim)

    def spread(self, tile: int, head: int, width: int):
        """Those of a pack that begins with `head`, each over `width` lanes: [token, (head, width)]."""
        sizes = self.sizes
        register, first = divmod(tile * sizes.tile, LANES)
        row = register % sizes.together * sizes.heads
        if sizes.on_matrix_unit:
            numbers = self._spread_all(row, width)[first : first + sizes.tile]
            return numbers[:, head * width : (head + sizes.pack) * width]
        column, parts = self._turned[first : first + sizes.tile], []
        for i in range(0, sizes.pack * width, LANES):
            place = (_lane(column.shape) + i) // width + row + head
            parts.append(jnp.take_along_axis(column, place, axis=1, mode="promise_in_bounds"))
        return jnp.concatenate(parts, axis=1)

    def _spread_all(self, first: int, width: int):
        """[tokens, (head, width)] of the register whose rows begin with `first`, on the matrix unit."""
        shape = (self._turned.shape[1], self.sizes.heads * width)
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        is_own = row % (shape[0] // 3) == first + lane // width
        return dot(self._turned, is_own.astype(jnp.bfloat16), PLAIN)


def _fill_lanes(x):
    return jnp.pad(x, ((0, 0), (0, LANES - x.shape[1])))


def _lane(shape):
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def head_blocks(sizes: Blocks, x):
    """[token, (head, channel)] -> for the heads of each register, [(head, token), (head, channel)], 0 for two different
    heads."""
    lanes = max(LANES, sizes.dim)
    parts = [x[:, first : first + lanes] for first in range(0, sizes.pack_channels, lanes)]
    if sizes.dim >= LANES:
        return parts
    blocks = []
    for part in parts:
        bits = pltpu.bitcast(part, jnp.uint32)
        head = _lane(bits.shape) // sizes.dim
        by_head = [jnp.where(head == h, bits, 0) for h in range(lanes // sizes.dim)]
        blocks.append(pltpu.bitcast(jnp.concatenate(by_head, axis=0), x.dtype))
    return blocks


def block_diagonal(blocks):
    """The blocks along a diagonal."""
    rows = []
    for i, block in enumerate(blocks):
        row = [jnp.zeros_like(block)] * len(blocks)
        row[i] = block
        rows.append(jnp.concatenate(row, axis=1))
    return jnp.concatenate(rows, axis=0)


def for_pack(sizes: Blocks, x):
    """[rows, (head, token)] of the heads of a register -> of a pack, the same for all."""
    return jnp.concatenate([x] * (sizes.pack_tokens // x.shape[1]), axis=1)


def over_registers(sizes: Blocks, x):
    """The sum over a pack's registers, [rows, (head, token)] -> the same for the heads of one."""
    return sum(x[:, first : first + LANES] for first in range(0, sizes.pack_tokens, LANES))


def seen(sizes: Blocks, tile: int, marks, *, reading_on_rows: bool):
    """Whether the reading token sees the writing one, of its segment and not after it: [token i, (head, token j)].

    Reading tokens are i if `reading_on_rows`, or else j. `marks`: ref [4, tokens], or None.
    """
    shape = (sizes.tile, sizes.pack_tokens)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    j %= sizes.tile
    is_seen = j <= i if reading_on_rows else i <= j
    if marks is not None:
        register = marks[0:1, pl.ds(tile * sizes.tile // LANES * LANES, LANES)]
        segment = pack_row(sizes, rows(sizes, sizes.place(tile), register), 0, sizes.tile)
        is_seen &= column(segment)[: sizes.tile] == segment
    return is_seen


class States:
    """B or C of a chunk, of a ref [tokens, N] or [N, tokens]: on rows and on lanes, whichever way it came."""

    def __init__(self, sizes: Blocks, ref):
        self.sizes, self.ref = sizes, ref
        self._register = functools.cache(self._register)

    def rows(self, tile: int):
        """Of a tile: [token, N]."""
        first = tile * self.sizes.tile
        if not self.sizes.turned:
            return self.ref[pl.ds(first, self.sizes.tile)]
        return self._register(first // LANES)[1][first % LANES :][: self.sizes.tile]

    def turned(self, tile: int):
        """Of a tile, the same for the heads of a register: [N, (head, token)]."""
        times = LANES // self.sizes.tile
        if not self.sizes.turned:
            return jnp.concatenate([self.rows(tile)] * times, axis=0).T
        first = tile * self.sizes.tile
        register = self._register(first // LANES)[0]
        return jnp.concatenate([register[:, first % LANES :][:, : self.sizes.tile]] * times, axis=1)

    def _register(self, number: int):
        """[N, 128 tokens] and [128 tokens, N]."""
        turned = self.ref[:, pl.ds(number * LANES, LANES)]
        return turned, turned.T


def wide(x):
    return x.astype(jnp.float32)
