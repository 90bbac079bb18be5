"""Lengths of the tiles of the Triton kernels of attention, by head dim."""

from typing import NamedTuple

from pallas_kernels.triton_call import Launch


class Blocks(NamedTuple):
    """Queries and keys of a tile, and how its program is spread."""

    queries: int
    keys: int
    launch: Launch


# By bytes of an entry, then by the largest head dim that an entry serves. Tiles fit into the 99 KiB of shared memory
# that every GPU since Ampere gives a block, and sums stay in registers.
FORWARD = {
    2: {
        64: Blocks(128, 64, Launch(4, 3)),
        128: Blocks(128, 64, Launch(8, 2)),
        256: Blocks(64, 32, Launch(8, 2)),
    },
    4: {
        64: Blocks(64, 32, Launch(4, 2)),
        128: Blocks(32, 32, Launch(4, 1)),
    },
}
BACKWARD = {
    2: {
        64: Blocks(64, 64, Launch(4, 2)),
        128: Blocks(64, 64, Launch(8, 1)),
        256: Blocks(32, 32, Launch(8, 1)),
    },
    4: {
        64: Blocks(32, 32, Launch(4, 1)),
        128: Blocks(32, 32, Launch(8, 1)),
    },
}


def largest_head_dim(dtype) -> int:
    """The largest head dim of a table's entries for a dtype."""
    return max(FORWARD[dtype.itemsize])


def of(table, q, v) -> Blocks:
    """The entry of a table for the dtype and the larger one of D and Dv."""
    head_dim = max(q.shape[3], v.shape[3])
    return next(entry for dim, entry in table[q.dtype.itemsize].items() if head_dim <= dim)
