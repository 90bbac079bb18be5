"""What the Triton kernels of attention share: the static specification, one tile of logits, and the tiles of a block.

Logits are in base 2, whose exponential the hardware has.
"""

import dataclasses
import math

import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.mask import Mask, Tokens
from pallas_kernels.attention.triton_blocks import Blocks
from pallas_kernels.triton_tiles import Heads, vector_pointers

LOG2_E = tl.constexpr(math.log2(math.e))
# Position of keys past the end: later than any query.
PADDING = tl.constexpr(masks.PADDING)
# The tiles of a block, in order: masked ones, ones of which every query sees every key, masked ones.
EARLY, FULL, LATE = (tl.constexpr(phase) for phase in range(3))


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static arguments of a kernel.

    Attributes:
        q: sizes of the queries; so are k and v.
        mask: static part of the mask.
        has_tokens: positions or segments come as arrays; else position is index.
        scale: factor on the logits.
        soft_cap: c of c tanh(logits / c), or None.
        blocks: queries and keys of a tile.
    """

    q: Heads
    k: Heads
    v: Heads
    mask: Mask
    has_tokens: bool
    scale: float
    soft_cap: float | None
    blocks: Blocks

    @property
    def out(self) -> Heads:
        """Sizes of the output."""
        return Heads(self.q.length, self.q.heads, self.v.dim)

    @property
    def group(self) -> int:
        """Heads of q that share one of k."""
        return self.q.heads // self.k.heads

    @property
    def num_query_blocks(self) -> int:
        return -(-self.q.length // self.blocks.queries)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.k.length // self.blocks.keys)

    @property
    def key_phases(self) -> tuple[int, int]:
        """Which phases the tiles of keys of a block of queries can be in: first and stop. With tokens all are EARLY."""
        if self.has_tokens:
            return EARLY.value, FULL.value
        return (FULL if self.mask.window is None else EARLY).value, LATE.value + 1

    @property
    def query_phases(self) -> tuple[int, int]:
        """Likewise the tiles of queries of a block of keys; with the diagonal they begin, by the window they end."""
        if self.has_tokens:
            return EARLY.value, FULL.value
        stop = FULL if self.mask.window is None else LATE
        return (EARLY if self.mask.causal else FULL).value, stop.value + 1


def token_arrays(spec: Spec, queries: Tokens, keys: Tokens, batch: int) -> list:
    """Positions of queries and of keys, int32 [B, T], or None where they are index; and their segments or None."""
    has_positions = spec.mask.causal and not spec.mask.is_ordered
    positions = [
        jnp.broadcast_to(x.position, (batch, x.position.shape[1])) if has_positions else None
        for x in (queries, keys)
    ]
    return [*positions, queries.segment, keys.segment]


@triton.jit
def load_tokens(position, segment, length: tl.constexpr, offset, batch, start, rows: tl.constexpr):
    """Positions and segments of the tokens [start, start + rows): their index plus `offset` and 0 where None."""
    positions = start + offset + tl.arange(0, rows)
    segments = tl.full((rows,), 0, tl.int32)
    if position is not None:
        pointers, exists = vector_pointers(position, length, batch, start, rows)
        positions = tl.load(pointers, mask=exists, other=PADDING)
    if segment is not None:
        pointers, exists = vector_pointers(segment, length, batch, start, rows)
        segments = tl.load(pointers, mask=exists, other=0)
    return positions, segments


# One tile.


@triton.jit
def base2_logits(s: tl.constexpr, products):
    """Products q · k -> logits times log2(e), soft cap included."""
    if s.soft_cap is None:
        logits = products * (s.scale * LOG2_E)
    else:
        logits = _tanh(products * (s.scale / s.soft_cap)) * (s.soft_cap * LOG2_E)
    return logits


@triton.jit
def soft_cap_slope(s: tl.constexpr, logits):
    """d capped / d uncapped = 1 - tanh², from the capped base-2 logits."""
    tanh = logits * (1 / (s.soft_cap * LOG2_E))
    return 1 - tanh * tanh


@triton.jit
def _tanh(x):
    """1 - 2 / (e^2x + 1), and near 0, where that cancels, its series."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1))


@triton.jit
def where_allowed(
    s: tl.constexpr, x, fill, query, key, q_segment, k_segment, has_segments: tl.constexpr
):
    """A tile with `fill` where a query does not see a key; positions and segments broadcast to the tile."""
    if s.mask.causal:
        distance = query - key
        allowed = distance >= 0
        if s.mask.window is not None:
            allowed = allowed & (distance < s.mask.window)
    else:
        allowed = key < s.k.length
    if has_segments:
        allowed = allowed & (q_segment == k_segment) & (q_segment != 0)
    return tl.where(allowed, x, fill)


# Which tiles a block visits: EARLY ones are [first, first_full), FULL ones up to stop_full, LATE ones up to stop.


@triton.jit
def key_tiles(s: tl.constexpr, start):
    """The tiles of keys that the block of queries from `start` visits: first, first_full, stop_full, stop."""
    low, high = 0, s.k.length
    low_full, high_full = 0, s.k.length
    if s.mask.causal and s.mask.is_ordered:
        first = start + s.mask.offset
        last = first + s.blocks.queries - 1
        high = tl.minimum(last + 1, high)
        high_full = tl.minimum(first + 1, high_full)
        if s.mask.window is not None:
            low = first - s.mask.window + 1
            low_full = last - s.mask.window + 1
    return _bounds(s.has_tokens, s.blocks.keys, low, high, low_full, high_full)


@triton.jit
def query_tiles(s: tl.constexpr, start):
    """The tiles of queries that the block of keys from `start` visits: first, first_full, stop_full, stop."""
    low, high = 0, s.q.length
    # Queries past the end count as ones that see everything: nothing comes of them.
    low_full, high_full = 0, s.num_query_blocks * s.blocks.queries
    if s.mask.causal and s.mask.is_ordered:
        first = start - s.mask.offset
        last = first + s.blocks.keys - 1
        low, low_full = first, last
        if s.mask.window is not None:
            high = tl.minimum(last + s.mask.window, high)
            high_full = tl.minimum(first + s.mask.window, high_full)
    return _bounds(s.has_tokens, s.blocks.queries, low, high, low_full, high_full)


@triton.jit
def _bounds(has_tokens: tl.constexpr, size: tl.constexpr, low, high, low_full, high_full):
    """Tiles that hold one of [low, high); of them those that lie in [low_full, high_full)."""
    first = tl.maximum(low, 0) // size
    stop = tl.maximum(tl.cdiv(tl.maximum(high, 0), size), first)
    first_full = stop
    if not has_tokens:
        first_full = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(low_full, 0), size), first), stop)
    stop_full = tl.minimum(tl.maximum(tl.maximum(high_full, 0) // size, first_full), stop)
    return first, first_full, stop_full, stop


@triton.jit
def tiles_of(phase: tl.constexpr, bounds):
    """The range of the tiles of a phase."""
    return bounds[phase], bounds[phase + 1]
