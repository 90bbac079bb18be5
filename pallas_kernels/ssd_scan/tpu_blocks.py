"""How much of the state-space-duality scan a TPU core takes at a time."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp

from pallas_kernels.blocks import Shape, Sizes, Table, round_up
from pallas_kernels.chips import matrix_width

LANES = 128
SUBLANES = 8
# Rows of a bfloat16 register, to which the states of a channel are filled up.
ROWS = 16
# Channels (heads x P) of a grid step. More amortise the grid, fewer keep the unrolled heads short.
MAX_CHANNELS = 512
# The tiles of a grid step are unrolled: the compiler needs ten seconds for the backward of as many.
MAX_CHUNK = 1024
# Heads of all tiles of a grid step, which are unrolled too.
MAX_HEADS = 128
# The state of all heads of a group stays in VMEM, beside the blocks of a step.
VMEM_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes.

    Attributes:
        chunk: tokens a grid step, a multiple of 128.
        heads: heads a grid step; heads x dim is a multiple of 128.
        per_group: heads a group, filled up to whole grid steps.
        dim: P, filled up to a power of two up to 128, or to a multiple of it.
        pack: heads side by side on lanes, which a product takes at once.
        turned: whether B and C come as [N, tokens]. XLA has tokens on lanes where N does not fill these.
    """

    chunk: int
    heads: int
    per_group: int
    dim: int
    pack: int
    turned: bool

    @property
    def tile(self) -> int:
        """Tokens whose weights are computed at once. Fewer are fewer pairs of tokens, but more states between them."""
        return _tile(self.dim)

    @property
    def tiles(self) -> int:
        """Tiles a chunk."""
        return self.chunk // self.tile

    @property
    def together(self) -> int:
        """Registers of tokens whose heads lie below each other in one array: few heads would leave sublanes empty.

        Together they fill the rows of a bfloat16 register. On a matrix unit the products that spread columns get longer
        with them: there they fill sublanes.
        """
        rows = SUBLANES if self.on_matrix_unit else ROWS
        return math.gcd(max(1, rows // self.heads), self.chunk // LANES)

    @property
    def groups(self) -> int:
        """Such arrays a chunk."""
        return self.chunk // LANES // self.together

    def group(self, tile: int) -> int:
        """The array that has a tile."""
        return tile * self.tile // LANES // self.together

    def place(self, tile: int) -> int:
        """Which tile of its register it is."""
        return tile % (LANES // self.tile)

    @property
    def on_matrix_unit(self) -> bool:
        """Whether `tpu_chunk.Columns` are spread by it: where it is wide enough for the heads of two registers."""
        return self.pack_channels > LANES

    @property
    def packs(self) -> int:
        """Packs of heads a grid step."""
        return self.heads // self.pack

    @property
    def pack_tokens(self) -> int:
        """Lanes of a pack with one for each head and token of a tile."""
        return self.pack * self.tile

    @property
    def pack_channels(self) -> int:
        """Lanes of a pack with one for each head and channel."""
        return self.pack * self.dim

    @property
    def channels(self) -> int:
        """Channels of a grid step."""
        return self.heads * self.dim

    @property
    def steps(self) -> int:
        """Grid steps that the heads of a group take."""
        return self.per_group // self.heads


def _tile(dim: int) -> int:
    return LANES // 2 if dim <= LANES // 2 else LANES


def _pack(heads: int, dim: int, width: int) -> int:
    """The heads of a pack: they fill a matrix unit of `width`, or else registers."""
    packs = (max(1, lanes // dim) for lanes in (LANES, width))
    return max(pack for pack in packs if heads % pack == 0)


def _flaw(sizes: Sizes, shape: Shape) -> str | None:
    chunk, heads = sizes["chunk"], sizes["heads"]
    if chunk % LANES or chunk > MAX_CHUNK:
        return f"chunk={chunk} is no multiple of {LANES} up to {MAX_CHUNK}"
    if chunk > max(LANES, shape["time"]):
        return f"chunk={chunk} is more tokens than there are, {shape['time']}"
    if shape["per_group"] % heads:
        return f"heads={heads} does not divide the heads of a group, {shape['per_group']}"
    if heads * shape["dim"] % LANES:
        return f"heads={heads} of {shape['dim']} channels are no multiple of {LANES}"
    if heads * chunk // _tile(shape["dim"]) > MAX_HEADS:
        return f"heads={heads} times the tiles of chunk={chunk} are more than {MAX_HEADS}, unrolled"
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

    The work is that of tiles, whatever a chunk is: more of them fill each other's waits, but the compiler takes longer.
    A matrix unit is 128 wide on v5e and 256 on v6e; a pack of heads fills it. `chunk_size` is rounded up to whole
    registers.
    """
    whole = round_up(time, LANES)
    by_rule = chunk_size or (4 * LANES if dtype == jnp.bfloat16 else 2 * LANES)
    chunk = min(round_up(by_rule, LANES), whole)
    dim = round_up(dim, LANES) if dim > LANES else max(ROWS, 1 << (dim - 1).bit_length())
    width = matrix_width(device_kind)
    fewest = max(1, LANES // dim)
    per_group = round_up(per_group, fewest)
    tiles = chunk // _tile(dim)
    heads = max(
        (
            heads
            for heads in range(fewest, per_group + 1, fewest)
            if per_group % heads == 0
            and (heads == fewest or (heads * dim <= MAX_CHANNELS and heads * tiles <= MAX_HEADS))
        ),
        key=lambda heads: (_pack(heads, dim, width), heads),
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
    return Blocks(chunk, heads, per_group, dim, _pack(heads, dim, width), states < LANES)


def vmem_bytes(sizes: Blocks, states: int, dtype) -> int:
    """Of the backward, which needs most: blocks are double-buffered, B and C have whole registers of lanes."""
    itemsize = jnp.dtype(dtype).itemsize
    lanes, states = round_up(states, LANES), round_up(states, ROWS)
    tokens = sizes.chunk * (2 * 3 * itemsize * sizes.channels + (2 * 4 * itemsize + 2 * 4) * lanes)
    state = sizes.channels * states
    # As it travels and beside it; before each tile; the blocks of three more.
    state *= sizes.steps * (4 + itemsize) + 2 * sizes.tiles * itemsize + 2 * 3 * 4
    rows = (2 * 4 + 4) * round_up(sizes.heads, 8) * sizes.chunk * 4
    weights = 16 * (sizes.tile + states) * sizes.pack_tokens * 4
    return tokens + state + rows + weights
