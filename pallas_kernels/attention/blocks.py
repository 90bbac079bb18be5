"""Lengths of the tiles of the TPU kernels, by device kind and shape."""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels.blocks import Shape, Sizes, Table

# Vector registers are 8 x 128, and the statistics of the queries lie along the minor axis of 128.
LANES = 128
# The longest side of a tile in bfloat16: its products fill the matrix unit to 94 % (v5e, static schedule), longer ones
# spill more registers and hold more masked logits on the diagonal. In float32 it is half of it.
LONGEST = 512
# Rows (the queries of all heads of a program) and keys of a tile, in units of `width`: all buffers of the backward then
# fit in 16 MiB of VMEM.
ROWS, KEYS = 2048, 1024
# They still do with a tile of the fewest queries, 128, that are this wide together.
WIDEST_GROUP = 32
# Heads that are worked on at the same time, their code side by side, where tiles are short; of the longest it is two.
MOST_TOGETHER = 6
# Key heads share a program only if dq of all their queries takes no more VMEM than this.
DQ_BYTES = 6 * 2**20
# With a short window most of a long tile is masked; below this length the grid step costs more than it saves.
SHORTEST_IN_WINDOW = 256


class Blocks(NamedTuple):
    """Queries and keys of a tile, multiples of 128."""

    queries: int
    keys: int


def _flaw(sizes: Sizes, shape: Shape) -> str | None:
    for name, length in sizes.items():
        if length % LANES:
            return f"{name}={length} is no multiple of {LANES}"
        if length > max(LANES, shape[f"num_{name}"]):
            return f"{name}={length} is more than there are, {shape[f'num_{name}']}"
    return None


TABLE = Table(
    path=Path(__file__).with_name("blocks.json"),
    lengths=("num_queries", "num_keys"),
    others=("group", "head_dim", "itemsize", "window"),
    sizes=Blocks._fields,
    flaw=_flaw,
)


def blocks(
    device_kind: str,
    *,
    num_queries: int,
    num_keys: int,
    group: int,
    head_dim: int,
    itemsize: int,
    window: int | None,
) -> Blocks:
    """Tile lengths for a shape.

    Args:
        device_kind: as `jax.Device.device_kind` says.
        num_queries: Tq.
        num_keys: Tk.
        group: heads of q whose rows are in one tile.
        head_dim: the larger one of D and Dv.
        itemsize: bytes of an entry of q, k and v.
        window: width of the sliding window, or None.
    """
    wide = width(head_dim, itemsize)
    keys = min(LONGEST * 2 // itemsize, KEYS // wide)
    # A power of two, as most lengths are multiples of one.
    queries = min(keys, 1 << (ROWS // (group * wide)).bit_length() - 1)
    if window is not None:
        shortest = max(SHORTEST_IN_WINDOW, 2 ** (window - 1).bit_length())
        queries, keys = min(queries, shortest), min(keys, shortest)
    sizes = TABLE.choose(
        device_kind,
        {"queries": _even(num_queries, queries), "keys": _even(num_keys, keys)},
        num_queries=num_queries,
        num_keys=num_keys,
        group=group,
        head_dim=head_dim,
        itemsize=itemsize,
        window=window,
    )
    return Blocks(_even(num_queries, sizes["queries"]), _even(num_keys, sizes["keys"]))


def width(head_dim: int, itemsize: int) -> int:
    """Bytes of one head of a token in VMEM, in units of 256."""
    return -(-head_dim // LANES) * itemsize // 2


def dq_bytes(lanes: int, itemsize: int) -> int:
    """Bytes that a query's `lanes` of dq take in VMEM: one sum in float32 and two buffers of the output."""
    return lanes * (4 + 2 * itemsize)


def heads_together(queries: int, keys: int, itemsize: int) -> int:
    """Heads whose logits are worked on at the same time, in tiles of these lengths.

    A product in float32 is of several in bfloat16, whose operands take VMEM too.
    """
    return min(8 * LONGEST**2 // (itemsize**2 * queries * keys), MOST_TOGETHER)


def _even(length: int, block: int) -> int:
    """Equal blocks of about `block` that cover `length` with the least padding."""
    num_blocks = -(-length // max(block, LANES))
    return -(-length // (num_blocks * LANES)) * LANES
