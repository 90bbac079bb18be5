"""Heads that score the vocabulary."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.nn import Linear
from effjax.nn.linear import product
from effjax.registry import register


@register("head", "tied")
class Tied(nn.Module):
    """Logits by the embedding table itself (Press and Wolf, 2017, arXiv 1608.05859).

    Attributes:
      soft_cap: if given, logits become cap * tanh(logits / cap).
    """

    soft_cap: float | None = None

    def flops_per_token(self, d_model: int, vocab_size: int) -> float:
        return 2.0 * d_model * vocab_size

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        *,
        embedding: Float[Array, "V D"],
        segment_ids: Int[Array, "B T"],
    ):
        logits = product(hidden, embedding.T.astype(hidden.dtype))
        return {"logits": soft_cap(logits, self.soft_cap)}


@register("head", "untied")
class Untied(nn.Module):
    """Logits by a matrix of their own.

    Attributes:
      soft_cap: if given, logits become cap * tanh(logits / cap).
    """

    soft_cap: float | None = None

    def flops_per_token(self, d_model: int, vocab_size: int) -> float:
        return 2.0 * d_model * vocab_size

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        *,
        embedding: Float[Array, "V D"],
        segment_ids: Int[Array, "B T"],
    ):
        logits = Linear(embedding.shape[0], name="unembed")(hidden)
        return {"logits": soft_cap(logits, self.soft_cap)}


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(logits / cap) in float32 (Gemma 2, arXiv 2408.00118, section 2); None leaves the logits alone."""
    logits = logits.astype(jnp.float32)
    return logits if cap is None else cap * jnp.tanh(logits / cap)
