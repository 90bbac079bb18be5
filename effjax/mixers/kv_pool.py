"""Caches of attention of which a batch uses some rows at a time, where they lie.

A decoder whose rows are at recursions of their own reads, for each of them, the cache of another recursion. To gather
these caches would cost as much as attention to them; a pool of them and the row of each costs nothing.
"""

import dataclasses
import math
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.mixers.kv_state import KVState

# Tokens of a page, where they divide a cache: `decode_attention` reads whole pages, and blocks of several.
PAGE_SIZE = 16
_SMALLEST_PAGE = 8


@flax.struct.dataclass
class KVPool:
    """Caches of P rows, each of one text: a `KVState` without what a token needs that comes last in its row.

    Attributes:
      k: [P, S, Hkv, D] keys, rotated already.
      v: [P, S, Hkv, D] values.
      length: [P] tokens written to each row; the next goes to slot `length % S`.
    """

    k: Float[Array, "P S H D"]
    v: Float[Array, "P S H D"]
    length: Int[Array, " P"]

    @classmethod
    def of(cls, state: KVState) -> "KVPool":
        """The rows of a cache; behind a leading axis of scanned layers too."""
        return cls(state.k, state.v, state.length)


@flax.struct.dataclass
class KVRows:
    """The decode state of a batch whose caches are some rows of a pool, one token a row at a time.

    Attributes:
      pool: the caches.
      rows: [B] that of each row of the batch, no two of which write to one; P or more: none.
      writes: [B] whether the token of a row is written. Where not, the cache has it already (recursive KV sharing).
    """

    pool: KVPool
    rows: Int[Array, " B"]
    writes: Bool[Array, " B"]

    frozen: ClassVar[bool] = False

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.pool.k.shape[1]

    @property
    def page_size(self) -> int:
        """The largest page that a cache is made of; all of it, if its size has no fitting divisor."""
        size = math.gcd(self.num_slots, PAGE_SIZE)
        return size if size >= _SMALLEST_PAGE else self.num_slots

    @property
    def page_table(self) -> Int[Array, "B N"]:
        """The pages of each row, as `pallas_kernels.decode_attention` takes them."""
        count = self.num_slots // self.page_size
        return self.rows[:, None] * count + jnp.arange(count, dtype=jnp.int32)

    @property
    def k(self) -> Float[Array, "pages page_size H D"]:
        """Keys of the pool, in pages."""
        return self._pages(self.pool.k)

    @property
    def v(self) -> Float[Array, "pages page_size H D"]:
        """Values of the pool, in pages."""
        return self._pages(self.pool.v)

    @property
    def length(self) -> Int[Array, " B"]:
        """Tokens in each row."""
        return self.pool.length.at[self.rows].get(mode="clip")

    def append(self, new: KVState) -> "KVRows":
        """Writes the one token of each row of `new` that is no padding, over the oldest if its cache is full."""
        num_rows = len(self.pool.length)
        row = jnp.where(self.writes & (new.segment_ids[:, 0] > 0), self.rows, num_rows)
        slot = self.length % self.num_slots

        def write(old, fresh):
            return old.at[row, slot].set(fresh[:, 0].astype(old.dtype), mode="drop")

        pool = KVPool(
            k=write(self.pool.k, new.k),
            v=write(self.pool.v, new.v),
            length=self.pool.length.at[row].add(1, mode="drop"),
        )
        return dataclasses.replace(self, pool=pool)

    def _pages(self, slots):
        return slots.reshape(-1, self.page_size, *slots.shape[2:])
