"""The decode state of attention: keys and values with the position and segment of each slot.

A slot is masked by its own position and segment, so full, windowed (ring) and shared caches are one structure: a ring
is a cache with as many slots as the window. What is appended is of one segment a row, the newest: its tokens fill the
slots from the first, which is how `pallas_kernels.decode_attention` reads them.
"""

import dataclasses
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class KVState:
    """Keys and values of the tokens seen so far.

    Attributes:
      k: [B, S, Hkv, D] keys, rotated already.
      v: [B, S, Hkv, D] values.
      positions: [B, S] position of each slot's token within its segment.
      segment_ids: [B, S] segment of each slot's token; 0 marks an empty slot.
      length: [B] tokens of the segment written to each row; the next goes to slot `length % S`.
      frozen: whether later queries only read (recursive KV sharing), never write.
      newest: of a frozen state, whether each row's query is the last token that was written.
    """

    k: Float[Array, "B S H D"]
    v: Float[Array, "B S H D"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, " B"]
    frozen: bool = flax.struct.field(pytree_node=False, default=False)
    newest: bool = flax.struct.field(pytree_node=False, default=False)

    page_table: ClassVar[None] = None  # each row's slots lie together

    @classmethod
    def empty(
        cls, batch_size: int, num_slots: int, num_heads: int, head_dim: int, dtype
    ) -> "KVState":
        kv = jnp.zeros((batch_size, num_slots, num_heads, head_dim), dtype)
        slots = jnp.zeros((batch_size, num_slots), jnp.int32)
        return cls(kv, kv, slots, slots, jnp.zeros((batch_size,), jnp.int32))

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    def freeze(self, newest: bool = False) -> "KVState":
        """The same state, to be read only; by each row's newest token, if so."""
        return dataclasses.replace(self, frozen=True, newest=newest)

    def append(self, new: "KVState") -> "KVState":
        """Writes the tokens of `new` (padding left out) behind those here, over the oldest slots if full.

        Only tokens of each row's newest segment stay: those of others, here or in `new`, are left out too.
        """
        num_slots = self.k.shape[1]
        newest = newest_segment(new.segment_ids)[:, None]
        stays = (self.segment_ids == newest) | (newest == 0)
        old_segments = jnp.where(stays, self.segment_ids, 0)
        old_length = jnp.where(stays.any(axis=1), self.length, 0)
        valid = (new.segment_ids > 0) & (new.segment_ids == newest)
        order = jnp.cumsum(valid, axis=1) - 1
        count = jnp.sum(valid, axis=1)
        # Only the newest num_slots tokens survive, so that no two of them claim one slot.
        kept = valid & (order >= (count - num_slots)[:, None])
        slot = jnp.where(kept, (old_length[:, None] + order) % num_slots, num_slots)
        rows = jnp.arange(self.k.shape[0])[:, None]

        def write(old, fresh):
            return old.at[rows, slot].set(fresh.astype(old.dtype), mode="drop")

        return dataclasses.replace(
            self,
            k=write(self.k, new.k),
            v=write(self.v, new.v),
            positions=write(self.positions, new.positions),
            segment_ids=write(old_segments, new.segment_ids),
            length=old_length + count,
        )

    def order(self) -> Int[Array, "B S"]:
        """How many tokens of its segment came before that of each slot; of an empty one it says nothing."""
        last = self.length[:, None] - 1
        num_slots = self.k.shape[1]
        return last - (last - jnp.arange(num_slots)) % num_slots

    def concatenate(self, new: "KVState") -> "KVState":
        """The slots here followed by those of `new`."""
        join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1)  # noqa: E731
        return dataclasses.replace(
            self,
            k=join(self.k, new.k),
            v=join(self.v, new.v),
            positions=join(self.positions, new.positions),
            segment_ids=join(self.segment_ids, new.segment_ids),
        )


def newest_segment(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The segment of each row's last token, 0 where it has none."""
    last = jnp.where(segment_ids > 0, jnp.arange(segment_ids.shape[1]), -1).max(axis=1)
    return jnp.take_along_axis(segment_ids, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
