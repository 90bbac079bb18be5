"""One chunk of the state-space-duality scan as the TPU kernels compute it: layout, masks and scales.

Tokens lie on lanes, [channels, tokens], whatever P is: what scales a token is a row, which spreads over sublanes as it
is loaded, and a head is a slice at whole registers. The weights are [s, t] with s the writing and t the reading token;
only the decay needs one factor as a column. Arrays come as [tokens, channels], as the model has them, and are turned
in VMEM, which spares their way through HBM. Weights are computed in tiles, so that one stays in registers, and those
with s after t are left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd_scan.tpu_blocks import TILE, Blocks

# Contracted dimensions of a product.
ROWS = ((0,), (0,))
PLAIN = ((1,), (0,))
LANES = ((1,), (1,))


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static arguments. `interpret`: as `pallas_call` has it."""

    blocks: Blocks
    interpret: bool | pltpu.InterpretParams


@dataclasses.dataclass(frozen=True)
class Scales:
    """What a chunk multiplies its tokens with, a row a head.

    Decays come from sums over the tokens of one tile: a sum over the chunk would have fewer digits where most of the
    weight is, between neighbours.

    Attributes:
        dt: [heads, Q].
        from_past: [heads, Q], what is left of the state before the chunk.
        to_end: [heads, Q], what is left at the end of the chunk of what a token writes.
        kept: [heads, 1], what is left at the end of the chunk of the state before it.
        total: [heads, Q], the sum of dt A / ln 2 from the beginning of a token's tile.
        ends: [heads, 1] for each tile, the sum over it.
        total_column: [Q, heads], `total` again.
    """

    dt: jax.Array
    from_past: jax.Array
    to_end: jax.Array
    kept: jax.Array
    total: jax.Array
    ends: list[jax.Array]
    total_column: jax.Array

    def decay(self, h, s: int, t: int):
        """exp of the sum of dt A from tokens of tile s to tokens of tile t, for head h; 0 for s after t."""
        of_head = slice(h, h + 1)
        reading = self.total[of_head, lanes(t)] + sum(end[of_head] for end in self.ends[s:t])
        difference = reading - self.total_column[lanes(s), of_head]
        if s == t:
            row, column = (jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), i) for i in (0, 1))
            difference = jnp.where(row <= column, difference, -jnp.inf)
        return jnp.exp2(difference)


def lanes(tile: int) -> slice:
    """The tokens of a tile."""
    return slice(tile * TILE, (tile + 1) * TILE)


def scales(dt, total, rows) -> Scales:
    """Of refs [heads, Q] (`Scales.total`) and of `rows`, `tpu.segment_rows` of the chunk or None."""
    total = total[...]
    tiles = range(total.shape[1] // TILE)
    ends = [total[:, lanes(tile)][:, -1:] for tile in tiles]
    from_past = [total[:, lanes(tile)] + sum(ends[:tile]) for tile in tiles]
    to_end = [sum(ends[tile + 1 :], ends[tile] - total[:, lanes(tile)]) for tile in tiles]
    from_past, to_end = (jnp.exp2(jnp.concatenate(x, axis=1)) for x in (from_past, to_end))
    kept = jnp.exp2(sum(ends))
    if rows is not None:
        from_past *= rows[1:2]
        to_end *= rows[2:3]
        kept *= rows[3:4, :1]
    return Scales(dt[...], from_past, to_end, kept, total, ends, total.T)


def allowed(rows, chunk: int):
    """Bool [s, t]: t reads what s writes, both of one segment and s not after t."""
    s, t = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
    if rows is None:
        return s <= t
    segment = jnp.broadcast_to(rows[0:1], (chunk, chunk))
    return (s <= t) & (segment == segment.T)


def similarity(B, C, rows):
    """B_s · C_t where t reads what s writes, float32 [s, t], of refs [Q, N]."""
    return jnp.where(allowed(rows, B.shape[0]), dot(B[...], C[...], LANES), 0)


def by_head(x, sizes: Blocks) -> list:
    """[channels, tokens] -> [P, tokens] for each head."""
    return [x[h * sizes.dim : (h + 1) * sizes.dim] for h in range(sizes.heads)]


def stack(heads):
    """The inverse of `by_head`."""
    return jnp.concatenate(heads, axis=0)


def wide(x):
    return x.astype(jnp.float32)


def dot(x, y, contracted):
    """A product with float32 sums; float32 operands are not rounded to the bfloat16 of the matrix unit."""
    precision = "highest" if x.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
