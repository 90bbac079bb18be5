"""Lengths of the tiles and chunks of the Triton kernels of linear attention."""

from typing import NamedTuple

from pallas_kernels.triton_call import Launch

# Tokens a chunk; tiles divide the multiple.
CHUNK_MULTIPLE, SHORTEST_CHUNK, LONGEST_CHUNK = 64, 128, 2048


class Blocks(NamedTuple):
    """Tokens of a tile, and how its program is spread."""

    tokens: int
    launch: Launch


# By bytes of an entry, then by the largest D + Dv that an entry serves: what stays in registers.
TABLE = {
    2: {
        80: Blocks(64, Launch(4, 2)),
        128: Blocks(32, Launch(4, 2)),
        256: Blocks(32, Launch(8, 2)),
    },
    4: {
        80: Blocks(32, Launch(8, 1)),
        128: Blocks(16, Launch(8, 1)),
    },
}


def of(q, v) -> Blocks | None:
    """The entry of the table for queries [B, T, H, D] and values [B, T, H, Dv], or None."""
    dims = q.shape[3] + v.shape[3]
    return next((entry for most, entry in TABLE[q.dtype.itemsize].items() if dims <= most), None)


def chunk(length: int, num_features: int, chunk_size: int | None) -> int:
    """Tokens a chunk: with as many as there are features, products inside of chunks and with states are as large."""
    if chunk_size is None:
        power = 1 << (num_features - 1).bit_length()
        chunk_size = min(max(power, SHORTEST_CHUNK), LONGEST_CHUNK)
    return -(-min(chunk_size, length) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
