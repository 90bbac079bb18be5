"""Heads that score the vocabulary."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from effjax.nn import Linear
from effjax.nn.linear import product
from effjax.registry import register


class _Scores(nn.Module):
    """What the heads share that multiply by a matrix [D, V], their `_matrix`."""

    soft_cap: float | None = None
    chunk_size: int | None = None

    def flops_per_token(self, d_model: int, vocab_size: int) -> float:
        return 2.0 * d_model * vocab_size

    def cross_entropy(
        self,
        hidden: Float[Array, "B T D"],
        *,
        embedding: Float[Array, "V D"],
        targets: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Of the logits for `targets`, in nats, and their log-sum-exp; of logits that are never all in memory."""
        matrix = self._matrix(embedding).astype(hidden.dtype)
        return pallas_kernels.linear_cross_entropy(
            hidden, matrix, targets, logits_soft_cap=self.soft_cap, chunk_size=self.chunk_size
        )


@register("head", "tied")
class Tied(_Scores):
    """Logits by the embedding table itself (Press and Wolf, 2017, arXiv 1608.05859).

    Attributes:
      soft_cap: if given, logits become cap * tanh(logits / cap).
      chunk_size: words of the vocabulary whose logits are in memory at once in training (`cross_entropy`), which then
        takes a fourth product beside three; None: all words.
    """

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        *,
        embedding: Float[Array, "V D"],
        segment_ids: Int[Array, "B T"],
    ):
        logits = product(hidden, self._matrix(embedding).astype(hidden.dtype))
        return {"logits": soft_cap(logits, self.soft_cap)}

    def _matrix(self, embedding):
        return embedding.T


@register("head", "untied")
class Untied(_Scores):
    """Logits by a matrix of their own.

    Attributes:
      soft_cap: if given, logits become cap * tanh(logits / cap).
      chunk_size: words of the vocabulary whose logits are in memory at once in training (`cross_entropy`), which then
        takes a fourth product beside three; None: all words.
    """

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

    @nn.compact
    def _matrix(self, embedding):
        return Linear(embedding.shape[0], name="unembed").matrix(embedding.shape[1])


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(logits / cap) in float32 (Gemma 2, arXiv 2408.00118, section 2); None leaves the logits alone."""
    logits = logits.astype(jnp.float32)
    return logits if cap is None else cap * jnp.tanh(logits / cap)
