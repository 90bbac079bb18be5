"""What a model begins with: from token ids to the first hidden states."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.nn.linear import lookup
from effjax.registry import register


@register("embed", "token")
class TokenEmbedding(nn.Module):
    """A row of a table for each token, and what some models add to it.

    Attributes:
      scale_by_width: the rows times sqrt(d_model) (Vaswani et al., 2017, section 3.4; Gemma, arXiv 2403.08295). The
        table that a tied head reads is not scaled.
      learned_positions: a learned vector for each of the model's `max_seq_len` positions is added (GPT-2, BERT).
      num_types: kinds of segments with a learned vector each (BERT, arXiv 1810.04805, section 3); every token gets that
        of the first kind. 0: there are none.
      norm: of the sum, or None.
    """

    scale_by_width: bool = False
    learned_positions: bool = False
    num_types: int = 0
    norm: nn.Module | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        sizes: tuple[int, int, int],
        dtype: str,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        """Returns the hidden states in `dtype`, and the table.

        Args:
          tokens: token ids.
          positions: position of each token within its segment.
          sizes: (vocabulary, d_model, positions).
          dtype: of the hidden states.
        """
        vocab_size, d_model, num_positions = sizes
        table = self._table("embedding", vocab_size, d_model)
        x = lookup(table, tokens, dtype)
        if self.scale_by_width:
            x = x * jnp.asarray(d_model**0.5, x.dtype)
        if self.learned_positions:
            x = x + lookup(self._table("position", num_positions, d_model), positions, dtype)
        if self.num_types:
            x = x + self._table("type", self.num_types, d_model)[0].astype(dtype)
        if self.norm is not None:
            # A copy: a template that other parts use too is not to be bound here.
            x = self.norm.clone(parent=self, name="out_norm")(x)
        return x, table

    @nn.compact
    def table(self, *, sizes: tuple[int, int, int]) -> Float[Array, "V D"]:
        """The table alone, for a head that reads it where no token is embedded."""
        vocab_size, d_model, _ = sizes
        return self._table("embedding", vocab_size, d_model)

    def _table(self, name: str, rows: int, columns: int) -> Float[Array, "N D"]:
        return self.param(name, nn.initializers.normal(0.02), (rows, columns), jnp.float32)
