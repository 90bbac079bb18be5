"""Tiles of arrays [B, T, H, D], as Triton kernels load and store them.

Arrays stay as they are in HBM. A tile has power-of-two sides, and what lies past the end of an axis is masked: it is
loaded as 0 and not stored.
"""

import dataclasses

import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes of an array [B, length, heads, dim], for kernels.

    Attributes:
        length: tokens of a row.
        heads: heads of a token.
        dim: entries of a head.
    """

    length: int
    heads: int
    dim: int

    @classmethod
    def of(cls, x) -> "Heads":
        """The sizes of an array."""
        return cls(*x.shape[1:])

    @property
    def width(self) -> int:
        """Entries of a head in a tile: a power of two, and as many as a product of tiles takes."""
        return max(16, 1 << (self.dim - 1).bit_length())


@triton.jit
def _pointers(x, sizes: tl.constexpr, batch, head, start, rows: tl.constexpr):
    """Pointers to the tokens [start, start + rows) of a head, and which of them exist."""
    row, column = tl.arange(0, rows)[:, None], tl.arange(0, sizes.width)[None, :]
    # All tokens of an array may be more entries than 32 bits count; those of a tile are not.
    first = x + ((batch.to(tl.int64) * sizes.length + start) * sizes.heads + head) * sizes.dim
    exists = row < sizes.length - start
    if sizes.dim != sizes.width:
        exists = exists & (column < sizes.dim)
    return first + row * (sizes.heads * sizes.dim) + column, exists


@triton.jit
def load_tile(x, sizes: tl.constexpr, batch, head, start, rows: tl.constexpr):
    """The tokens [start, start + rows) of a head, [rows, width]."""
    pointers, exists = _pointers(x, sizes, batch, head, start, rows)
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def store_tile(x, sizes: tl.constexpr, batch, head, start, tile):
    """Writes what `load_tile` would load."""
    pointers, exists = _pointers(x, sizes, batch, head, start, tile.shape[0])
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=exists)


@triton.jit
def vector_pointers(x, length: tl.constexpr, row, start, entries: tl.constexpr):
    """Pointers to the entries [start, start + entries) of a row of [rows, length], and which of them exist."""
    index = tl.arange(0, entries)
    return x + row.to(tl.int64) * length + start + index, index < length - start


@triton.jit
def dot(x, y, sums=None):
    """x · y, added to `sums` if any: float32.

    Products of float32 are three of tf32 each, on tensor cores: Ootomo and Yokota, "Recovering single precision
    accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", arXiv 2203.03341.
    """
    return tl.dot(x, y, sums, input_precision="tf32x3")


@triton.jit
def exact_dot(x, y, sums=None):
    """As `dot`, where a kernel has no registers for the two parts of each operand: float32 without tensor cores."""
    return tl.dot(x, y, sums, input_precision="ieee")
