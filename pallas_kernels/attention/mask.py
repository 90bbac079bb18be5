"""Which key a query may see: the one definition that every implementation of attention shares.

Whether a query sees a key depends on what each knows of itself (`Tokens`) and on the static `Mask`. `allowed` is
elementwise, so that a tiled implementation asks for one tile and never builds a T x T array; the static bounds
`keys_of` and `queries_of` tell it which tiles hold anything at all.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Position of the keys that fill up a tile: later than any query.
PADDING = 2**30


class Tokens(NamedTuple):
    """What the mask knows of the queries or of the keys.

    Attributes:
        position: int32 [B or 1, T].
        segment: int32 [B, T], 0 for padding; or None.
    """

    position: jax.Array
    segment: jax.Array | None

    def as_rows(self) -> "Tokens":
        """[..., T] -> [..., T, 1]."""
        return jax.tree.map(lambda x: x[..., :, None], self)

    def as_columns(self) -> "Tokens":
        """[..., T] -> [..., 1, T]."""
        return jax.tree.map(lambda x: x[..., None, :], self)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Static part of the attention mask.

    Attributes:
        num_queries: Tq.
        num_keys: Tk.
        causal: a query sees no key of a later position.
        window: a query sees keys of positions `(p - window, p]` only; None: no bound.
        is_ordered: position is index (the queries aligned to the end of the keys), so that the bounds are known.
    """

    num_queries: int
    num_keys: int
    causal: bool
    window: int | None
    is_ordered: bool

    def takes_tokens(self, queries: Tokens) -> bool:
        """Whether `allowed` depends on positions or segments that come as arrays, and not on index alone."""
        return queries.segment is not None or (self.causal and not self.is_ordered)

    @property
    def offset(self) -> int:
        """Position of query 0 in index order."""
        return self.num_keys - self.num_queries

    def keys_of(self, start: int, stop: int) -> tuple[int, int]:
        """Range of keys that the queries [start, stop) may see."""
        low, high = 0, self.num_keys
        if self.causal and self.is_ordered:
            high = stop + self.offset
            if self.window is not None:
                low = start + self.offset - self.window + 1
        return _clip(low, high, self.num_keys)

    def queries_of(self, start: int, stop: int) -> tuple[int, int]:
        """Range of queries that may see one of the keys [start, stop)."""
        low, high = 0, self.num_queries
        if self.causal and self.is_ordered:
            low = start - self.offset
            if self.window is not None:
                high = stop - self.offset + self.window - 1
        return _clip(low, high, self.num_queries)

    def allowed(self, queries: Tokens, keys: Tokens) -> jax.Array:
        """Whether a query sees a key; the arguments broadcast against each other."""
        if self.causal:
            distance = queries.position - keys.position
            result = distance >= 0
            if self.window is not None:
                result &= distance < self.window
        else:
            result = keys.position < PADDING
        if queries.segment is not None:
            result = result & (queries.segment == keys.segment) & (queries.segment != 0)
        return result


def token_rows(tokens: Tokens, block: int, padding: int) -> jax.Array:
    """Positions, and segments if any, int32 [B or 1, 1 or 2, T] with T filled up to a multiple of `block`.

    `padding` is the position of what fills up; its segment is 0.
    """
    more = ((0, 0), (0, -tokens.position.shape[1] % block))
    position = jnp.pad(tokens.position, more, constant_values=padding)
    if tokens.segment is None:
        return position[:, None]
    segment = jnp.pad(tokens.segment, more)
    return jnp.stack([jnp.broadcast_to(position, segment.shape), segment], axis=1)


def _clip(low: int, high: int, length: int) -> tuple[int, int]:
    low = min(max(low, 0), length)
    return low, min(max(high, low), length)
