"""The decode state of attention in pages: rows of very different lengths share one memory.

A row of a `KVState` has the room of the longest text that may come. Here the rows have pages of a common pool, as many
as their texts need (Kwon et al., 2023, "PagedAttention", arXiv 2309.06180); who gets which page is decided outside.
"""

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.mixers.kv_state import KVState


@flax.struct.dataclass
class PagedKVState:
    """Keys and values of the tokens seen so far, those of each row in pages of its own.

    A row is one text: its tokens are all of one segment, their positions count from 0, and none is ever pushed out.

    Attributes:
      k: [P, page_size, Hkv, D] keys, rotated already, of the pages of all rows.
      v: [P, page_size, Hkv, D] values.
      page_table: [B, N] token j of row b is entry j % page_size of page `page_table[b, j // page_size]`; P where the
        row has no page, and what is written there is lost.
      length: [B] tokens of each row.
      frozen, newest: as in `KVState`.
    """

    k: Float[Array, "P page_size H D"]
    v: Float[Array, "P page_size H D"]
    page_table: Int[Array, "B N"]
    length: Int[Array, " B"]
    frozen: bool = flax.struct.field(pytree_node=False, default=False)
    newest: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def num_slots(self) -> int:
        """Tokens that a row may have."""
        return self.page_table.shape[1] * self.k.shape[1]

    def freeze(self, newest: bool = False) -> "PagedKVState":
        """As `KVState.freeze`."""
        return dataclasses.replace(self, frozen=True, newest=newest)

    def append(self, new: KVState) -> "PagedKVState":
        """Writes the tokens of `new` (padding left out) behind those here."""
        num_pages, page_size = self.k.shape[:2]
        valid = new.segment_ids > 0
        token = self.length[:, None] + jnp.cumsum(valid, axis=1) - 1
        page = jnp.take_along_axis(
            self.page_table, token // page_size, axis=1, mode="fill", fill_value=num_pages
        )
        page = jnp.where(valid, page, num_pages)

        def write(pages, fresh):
            return pages.at[page, token % page_size].set(fresh.astype(pages.dtype), mode="drop")

        return dataclasses.replace(
            self,
            k=write(self.k, new.k),
            v=write(self.v, new.v),
            length=self.length + jnp.sum(valid, axis=1, dtype=jnp.int32),
        )

    def order(self) -> Int[Array, "B S"]:
        """As `KVState.order`."""
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)
        return jnp.broadcast_to(slots, (len(self.length), self.num_slots))

    def concatenate(self, new: KVState) -> KVState:
        """The tokens here, laid out one row after the other, followed by those of `new`."""
        order = self.order()

        def rows(pages):
            taken = jnp.take(pages, self.page_table, axis=0, mode="clip")
            return taken.reshape(*order.shape, *pages.shape[2:])

        segment_ids = (order < self.length[:, None]).astype(jnp.int32) * _segment(new)
        return KVState(rows(self.k), rows(self.v), order, segment_ids, self.length).concatenate(new)


def _segment(new: KVState) -> Int[Array, "B 1"]:
    """The one segment of each row."""
    return jnp.max(new.segment_ids, axis=1, keepdims=True)
