"""The decode state of attention: keys and values with the position and segment of each slot.

A slot is masked by its own position and segment, so full, windowed (ring) and shared caches are one structure: a ring
is a cache with as many slots as the window.
"""

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
      length: [B] tokens ever written to each row; the next goes to slot `length % S`.
      frozen: whether later tokens only read (recursive KV sharing), never write.
    """

    k: Float[Array, "B S H D"]
    v: Float[Array, "B S H D"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, " B"]
    frozen: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls, batch_size: int, num_slots: int, num_heads: int, head_dim: int, dtype
    ) -> "KVState":
        kv = jnp.zeros((batch_size, num_slots, num_heads, head_dim), dtype)
        slots = jnp.zeros((batch_size, num_slots), jnp.int32)
        return cls(kv, kv, slots, slots, jnp.zeros((batch_size,), jnp.int32))

    def freeze(self) -> "KVState":
        """The same state, to be read only."""
        return self.replace(frozen=True)

    def append(self, new: "KVState") -> "KVState":
        """Writes the tokens of `new` (padding left out) behind those here, over the oldest slots if full."""
        num_slots = self.k.shape[1]
        valid = new.segment_ids > 0
        order = jnp.cumsum(valid, axis=1) - 1
        count = jnp.sum(valid, axis=1)
        # Only the newest num_slots tokens survive, so that no two of them claim one slot.
        kept = valid & (order >= (count - num_slots)[:, None])
        slot = jnp.where(kept, (self.length[:, None] + order) % num_slots, num_slots)
        rows = jnp.arange(self.k.shape[0])[:, None]

        def write(old, fresh):
            return old.at[rows, slot].set(fresh.astype(old.dtype), mode="drop")

        return self.replace(
            k=write(self.k, new.k),
            v=write(self.v, new.v),
            positions=write(self.positions, new.positions),
            segment_ids=write(self.segment_ids, new.segment_ids),
            length=self.length + count,
        )

    def concatenate(self, new: "KVState") -> "KVState":
        """The slots here followed by those of `new`."""
        join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1)  # noqa: E731
        return self.replace(
            k=join(self.k, new.k),
            v=join(self.v, new.v),
            positions=join(self.positions, new.positions),
            segment_ids=join(self.segment_ids, new.segment_ids),
        )
