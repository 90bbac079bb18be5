"""What the forward and backward GPU kernels share: static specification, one tile of logits, layouts and the grid.

Arrays stay as they are in HBM, [B, T, H, D], with time padded to whole tiles and D to whole rows of 128 bytes.
Logits are in base 2, whose exponential the hardware has.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention.mask import PADDING, Mask, Tokens, token_rows
from pallas_kernels.hopper import ROWS, WARPGROUPS, along, load_vector

LOG2_E = math.log2(math.e)
# Below any logit, and finite: the difference of two of them is 0.
LOWEST = -1e30
# Rows of a block.
BLOCK = WARPGROUPS * ROWS
LARGEST_HEAD_DIM = 128
# Entries of a head that a padded row has a multiple of: 128 bytes, the widest swizzle of shared memory.
HEAD_MULTIPLE = 64
# Shared memory for a ring of k and v, or of q and d_out, and the most tiles that are of use there.
RING_BYTES, MOST_STAGES = 2**17, 4
# Axes of the grid.
AXES = ("batch", "head", "block")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static arguments of the kernels.

    Attributes:
        mask: static part of the mask.
        scale: factor on the logits.
        logits_soft_cap: c of c tanh(logits / c), or None.
        has_tokens: positions or segments come as arrays; else position is index.
        interpret: as `hopper.call` takes it.
    """

    mask: Mask
    scale: float
    logits_soft_cap: float | None
    has_tokens: bool
    interpret: Any


# One tile.


def base2_logits(spec: Spec, products):
    """Products q · k -> logits times log2(e), soft cap included."""
    if spec.logits_soft_cap is None:
        return products * (spec.scale * LOG2_E)
    cap = spec.logits_soft_cap
    # The instruction for tanh is good to 11 bits only: tanh x = 1 - 2 / (e^2x + 1).
    powers = jnp.exp2(products * (2 * LOG2_E * spec.scale / cap))
    return (cap * LOG2_E) - (2 * cap * LOG2_E) / (powers + 1)


def logits_and_factor(spec: Spec, products):
    """Products q · k -> logits in base 2 but for a positive factor, and the factor.

    A multiplication and a subtraction after it are one instruction.
    """
    if spec.logits_soft_cap is None and spec.scale > 0:
        return products, spec.scale * LOG2_E
    return base2_logits(spec, products), 1.0


def soft_cap_slope(spec: Spec, logits):
    """d capped / d uncapped = 1 - tanh², from the capped base-2 logits."""
    tanh = logits * (1 / (spec.logits_soft_cap * LOG2_E))
    return 1 - tanh * tanh


def where_allowed(spec: Spec, x, fill: float, query, key, is_full, *, queries_axis: int):
    """A tile with `fill` where a query does not see a key.

    Args:
        spec: the specification.
        x: the tile, [queries, keys] or [keys, queries].
        fill: value of the others.
        query: index of the first query of the tile; with tokens, `Tokens` of vectors.
        key: likewise.
        is_full: whether the static mask allows all of the tile.
        queries_axis: 0 for a tile [queries, keys], 1 for [keys, queries].
    """

    def mask(x):
        if spec.has_tokens:
            queries, keys = (
                jax.tree.map(lambda vector, axis=axis: along(vector, x.shape, axis), tokens)
                for tokens, axis in ((query, queries_axis), (key, 1 - queries_axis))
            )
        else:
            index = functools.partial(
                plgpu.broadcasted_iota, jnp.int32, x.shape, layout=plgpu.Layout.WGMMA
            )
            queries = Tokens(index(queries_axis) + (query + spec.mask.offset), None)
            position = index(1 - queries_axis) + key
            keys = Tokens(jnp.where(position < spec.mask.num_keys, position, PADDING), None)
        return jnp.where(spec.mask.allowed(queries, keys), x, fill)

    return mask(x) if spec.has_tokens else jax.lax.cond(is_full, lambda x: x, mask, x)


class Softmax(NamedTuple):
    """The softmax of rows that meet one tile of keys after the other, in registers (FlashAttention-2, algorithm 1).

    Attributes:
        values: sum of the weighted values, float32 [ROWS, Dv].
        total: sum of the weights, float32 [ROWS].
        highest: logit, in base 2, of which a weight is 1, float32 [ROWS].
    """

    values: jax.Array
    total: jax.Array
    highest: jax.Array

    @classmethod
    def of_nothing(cls, value_dim: int) -> "Softmax":
        nothing = hopper.zeros(ROWS)
        return cls(hopper.zeros(ROWS, value_dim), nothing, nothing + LOWEST)

    def add(self, logits, factor, v_tile, interpret) -> "Softmax":
        """With a tile's logits as of `logits_and_factor`, -inf where masked, and its values in shared memory."""
        highest = jnp.maximum(self.highest, logits.max(axis=1) * factor)
        weights = jnp.exp2(logits * factor - along(highest, logits.shape, 0))
        rescale = jnp.exp2(self.highest - highest)
        total = self.total * rescale + weights.sum(axis=1)
        values = self.values * along(rescale, self.values.shape, 0)
        return Softmax(hopper.add_product(values, weights, v_tile, interpret), total, highest)

    def result(self):
        """Output and log-sum-exp; a row that saw nothing has total 0: 0 and -inf."""
        divisor = along(jnp.where(self.total == 0, 1, self.total), self.values.shape, 0)
        return self.values / divisor, self.highest * (1 / LOG2_E) + jnp.log(self.total)


def load_tokens(ref, axis: int) -> Tokens:
    """int32 [1 or 2, T] -> the vectors of positions and, if any, of segments along `axis` of a tile."""
    return Tokens(
        load_vector(ref.at[0], axis), load_vector(ref.at[1], axis) if ref.shape[0] == 2 else None
    )


# Which tiles a block visits.


class Visited(NamedTuple):
    """The tiles [first, stop) that a block visits, of which [first_full, stop_full) need no mask (`visits.ranges`)."""

    first: jax.Array
    first_full: jax.Array
    stop_full: jax.Array
    stop: jax.Array

    @property
    def num_tiles(self):
        return self.stop - self.first

    def is_full(self, tile):
        """Whether the static mask allows all of a visited tile."""
        return (tile >= self.first_full) & (tile < self.stop_full)


def load_visited(table, block) -> Visited:
    """Reads a row of `visits.ranges`."""
    return Visited(*(table[block, i] for i in range(4)))


# Layouts in HBM and the grid.


def pad_time(x, block: int):
    """[B, T, ...] with T a multiple of `block`."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def width(q, v) -> int:
    """Entries of a padded head of q, k, v and the output."""
    return -(-max(q.shape[3], v.shape[3]) // HEAD_MULTIPLE) * HEAD_MULTIPLE


def pad_heads(x, block: int, width: int):
    """[B, T, H, D] with T a multiple of `block`, and D = `width`."""
    return jnp.pad(pad_time(x, block), [(0, 0)] * 3 + [(0, width - x.shape[3])])


def token_arrays(spec: Spec, queries: Tokens, keys: Tokens, q_block: int, k_block: int) -> list:
    """Positions and segments, if any, of queries and of keys as two int32 [B or 1, 1 or 2, T padded]."""
    if not spec.has_tokens:
        return []
    return [token_rows(queries, q_block, 0), token_rows(keys, k_block, PADDING)]


def of_batch(tokens, batch, start, length: int):
    """The tokens [start, start + length) of a row of `token_arrays`, whose batch may be 1."""
    return tokens.at[batch if tokens.shape[0] > 1 else 0, :, pl.ds(start, length)]


def key_ring(k, v, tokens, length: int) -> hopper.Ring:
    """Scratch for a ring of tiles of `length` keys; `tokens` as `token_arrays` makes them."""
    pieces = [((length, x.shape[3]), x.dtype) for x in (k, v)]
    pieces += [((x.shape[1], length), x.dtype) for x in tokens[1:]]
    return hopper.ring(*pieces, stages=stages(k.shape[3], length))


def stages(width: int, length: int) -> int:
    """Tiles of a ring: the copy of one has the time of the others that are there to arrive in.

    A tile has `length` tokens of two arrays.
    """
    return min(MOST_STAGES, RING_BYTES // (2 * width * length * jnp.dtype(jnp.bfloat16).itemsize))


def keys_of(x, q, batch, head, tile, length: int):
    """A tile of k or v, `length` keys, for the query head `head` of q."""
    return x.at[batch, pl.ds(tile * length, length), jax.lax.div(head, q.shape[2] // x.shape[2])]


def start_keys(
    ring: hopper.Ring, visited: Visited, q, k, v, tokens, batch, head, length: int, ahead: int = 0
) -> hopper.Tiles:
    """The tiles that a block of the query head `head` visits, of `length` keys each.

    `ahead`: a tile brings the k of the tile so many further on, the last ones that of the last.
    """

    def pieces(i):
        tile = visited.first + i
        start = tile * length
        yield keys_of(k, q, batch, head, jnp.minimum(tile + ahead, visited.stop - 1), length)
        yield keys_of(v, q, batch, head, tile, length)
        for x in tokens[1:]:
            yield of_batch(x, batch, start, length)

    return ring.start(visited.num_tiles, pieces)


def grid(batch: int, heads: int, length: int) -> dict[str, int]:
    """Blocks of the same head run together, and share k and v in the cache of the chip."""
    return dict(zip(AXES, (batch, heads, length // BLOCK), strict=True))
