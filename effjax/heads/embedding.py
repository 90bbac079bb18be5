"""One vector per text: pooling over its tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.nn import Linear
from effjax.registry import register, unknown

POOLER = "pooler"


@register("head", "embedding")
class Embedding(nn.Module):
    """Pools the hidden states of a text into one float32 vector.

    A row is one text, padding is segment 0. The vectors are not normalised: whoever uses them cuts
    them first and normalises after (`effjax.heads.matryoshka.truncate`), because the prefix of a
    unit vector is not one.

    Attributes:
      pooling: one of `POOLINGS`; "mean" (Reimers and Gurevych, 2019, arXiv 1908.10084, section 3),
        "first" for encoders with a class token, "last" for causal models; or "pooler", which is
        tanh(W x + b) of the first (Devlin et al., 2018, arXiv 1810.04805; trained by its
        next-sentence prediction).
      dim: size of the embedding, by a learned projection; None takes the pooled state itself.
      pooler: whether there are the parameters of a pooler, which a checkpoint may bring, even where
        another pooling makes nothing of them.
    """

    pooling: str = "mean"
    dim: int | None = None
    pooler: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.pooling not in (*POOLINGS, POOLER):
            raise ValueError(unknown("pooling", self.pooling, (*POOLINGS, POOLER)))
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"dim is {self.dim}; valid: 1 or more, or None")

    def flops_per_token(self, d_model: int, vocab_size: int) -> float:
        """0: this head runs once a text, not once a token."""
        return 0.0

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        *,
        embedding: Float[Array, "V D"],
        segment_ids: Int[Array, "B T"],
    ):
        is_through = self.pooling == POOLER
        pool = POOLINGS["first" if is_through else self.pooling]
        pooled = pool(hidden.astype(jnp.float32), segment_ids)
        if self.pooler or is_through:
            through = jnp.tanh(Linear(hidden.shape[-1], use_bias=True, name="pooler")(pooled))
            pooled = through if is_through else pooled
        if self.dim is not None:
            pooled = Linear(self.dim, name="projection")(pooled)
        return {"embeddings": pooled}


def mean_pool(hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean over the tokens that are not padding; zero for a row that is all padding."""
    mask = (segment_ids > 0).astype(hidden.dtype)
    total = jnp.einsum("btd,bt->bd", hidden, mask, precision="highest")
    return total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)


def first_pool(
    hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B D"]:
    """State of the first token that is not padding; zero for a row that is all padding."""
    return _pick(hidden, segment_ids, jnp.argmax(segment_ids > 0, axis=1))


def last_pool(hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """State of the last token that is not padding; zero for a row that is all padding."""
    from_end = jnp.argmax(segment_ids[:, ::-1] > 0, axis=1)
    return _pick(hidden, segment_ids, hidden.shape[1] - 1 - from_end)


def _pick(hidden, segment_ids, index):
    picked = jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]
    return jnp.where(jnp.any(segment_ids > 0, axis=1, keepdims=True), picked, 0.0)


POOLINGS = {"mean": mean_pool, "first": first_pool, "last": last_pool}
