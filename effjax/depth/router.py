"""The small network that scores tokens for a depth decision."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.nn import Linear
from effjax.registry import unknown

KINDS = ("linear", "mlp")

_small_init = nn.initializers.normal(0.02)


class Router(nn.Module):
    """Scores in float32, from hidden states that are not normalised, as in the authors' code of arXiv 2507.10524.

    Attributes:
      num_scores: scores a token.
      kind: "linear", or "mlp" with one GELU layer of twice the model's width.
      temperature: the hidden states are divided by it.
    """

    num_scores: int = 1
    kind: str = "linear"
    temperature: float = 1.0

    def flops_per_token(self, d_model: int) -> float:
        if self.kind == "linear":
            return 2.0 * d_model * self.num_scores
        return 2.0 * 2 * d_model * (d_model + self.num_scores)

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T S"]:
        """Raises ValueError for an unknown kind."""
        if self.kind not in KINDS:
            raise ValueError(unknown("router", self.kind, KINDS))
        hidden = x.astype(jnp.float32) / self.temperature
        if self.kind == "mlp":
            hidden = Linear(2 * x.shape[-1], kernel_init=_small_init, name="up")(hidden)
            hidden = nn.gelu(hidden, approximate=False)
        return Linear(self.num_scores, kernel_init=_small_init, name="router")(hidden)
