"""Some tokens of each row, gathered into a shorter row of static length and brought back."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

# Slots of long rows come in tiles of so many, which matrix units and meshes divide.
TILE, LONG = 128, 1024


@flax.struct.dataclass
class Subset:
    """Up to K of the T tokens of each row, in their order, so that what is causal stays causal.

    A shape under `jit` is static, so a row that has fewer than K tokens to offer has empty slots at its end.

    Attributes:
      token: [B, K] the token in each slot; T in an empty one.
      slot: [B, T] the slot of each token; K if it is not in the subset.
    """

    token: Int[Array, "B K"]
    slot: Int[Array, "B T"]

    @classmethod
    def of(cls, chosen: Bool[Array, "B T"], size: int) -> "Subset":
        """The first `size` of the chosen tokens of each row."""
        length = chosen.shape[1]
        order = jnp.argsort(~chosen, axis=1, stable=True)[:, :size]
        count = jnp.sum(chosen, axis=1, keepdims=True)
        token = jnp.where(jnp.arange(size) < count, order, length)
        slot = jnp.where(chosen, jnp.minimum(jnp.cumsum(chosen, axis=1) - 1, size), size)
        return cls(token.astype(jnp.int32), slot.astype(jnp.int32))

    @property
    def size(self) -> int:
        """K."""
        return self.token.shape[1]

    def take(self, values: Shaped[Array, "B T ..."]) -> Shaped[Array, "B K ..."]:
        """The values of the subset's tokens; zeros in empty slots."""
        return _transfer(values, self.token, self.slot)

    def spread(self, values: Shaped[Array, "B K ..."]) -> Shaped[Array, "B T ..."]:
        """The values back at their tokens; zeros at tokens that are not in the subset."""
        return _transfer(values, self.slot, self.token)


def slots_for(count: int, length: int) -> int:
    """Slots K for up to `count` tokens of rows of `length`: as many, or in long rows a few more that stay empty."""
    return count if length < LONG else min(length, -(-count // TILE) * TILE)


@jax.custom_vjp
def _transfer(values, source, destination):
    """result[b, i] = values[b, source[b, i]], or 0 where that is past the end."""
    take = lambda v, i: jnp.take(v, i, axis=0, mode="fill", fill_value=0)  # noqa: E731
    return jax.vmap(take)(values, source)


# Autodiff would transpose the gather to a scatter; as tokens and slots pair off one to one, it is a gather too.
_transfer.defvjp(
    lambda values, source, destination: (
        _transfer(values, source, destination),
        (source, destination),
    ),
    lambda pairing, g: (_transfer(g, pairing[1], pairing[0]), None, None),
)
