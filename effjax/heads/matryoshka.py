"""Matryoshka representations: the first m coordinates of an embedding are an embedding themselves.

Kusupati et al., 2022, arXiv 2205.13147. Training applies the loss to every prefix of a list of
nested dimensions (`effjax.objectives.matryoshka`); at use an embedding is cut to what the index,
the memory or the latency allows.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.heads.embedding import Embedding
from effjax.nn import Linear
from effjax.registry import register

# Floor of the squared norm: the zero vector of an empty text stays zero and has a gradient.
_SMALLEST_SQUARE = 1e-12


def truncate(embeddings: Float[Array | np.ndarray, "... E"], dim: int) -> Float[Array, "... m"]:
    """The first `dim` coordinates, scaled back to unit length: a Matryoshka embedding at use.

    Raises:
      ValueError: if `dim` is not within 1..E.
    """
    if not 1 <= dim <= embeddings.shape[-1]:
        raise ValueError(f"dim is {dim}; valid: 1 to the embedding size {embeddings.shape[-1]}")
    prefix = jnp.asarray(embeddings)[..., :dim]
    square = jnp.sum(jnp.square(prefix), axis=-1, keepdims=True)
    return prefix * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_SQUARE))


def check_dims(field: str, dims: Sequence[int], size: int | None = None) -> None:
    """Checks that `dims` nest: one or more, increasing, in an embedding of `size` coordinates.

    Raises:
      ValueError: naming `field`, if they do not.
    """
    increasing = all(a < b for a, b in zip((0, *dims), dims, strict=False))
    if not dims or not increasing or (size is not None and dims[-1] > size):
        limit = "" if size is None else f", at most the embedding size {size}"
        raise ValueError(
            f"{field} is {dims}; valid: one or more increasing positive integers{limit}"
        )


@register("head", "matryoshka_classifier")
class MatryoshkaClassifier(nn.Module):
    """Class scores of a text from each of several nested prefixes of its embedding z.

    Kusupati et al., 2022, arXiv 2205.13147, section 3. MRL has a linear classifier of its own for
    each dimension m: W_m z[:m] + b_m. The efficient variant MRL-E ties them, W_m = W[:, :m] with
    one bias, which needs the memory of the largest alone.

    Attributes:
      num_classes: C, number of classes.
      dims: the nested dimensions m, increasing.
      tie_weights: MRL-E instead of MRL.
      use_bias: whether the classifiers have biases.
      head: gives the embedding z.
    """

    num_classes: int
    dims: tuple[int, ...] = (8, 16, 32, 64, 128)
    tie_weights: bool = False
    use_bias: bool = True
    head: nn.Module = Embedding()

    def __post_init__(self):
        super().__post_init__()
        check_dims("dims", self.dims)
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}; valid: 2 or more")

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
        """Returns `class_logits`, a dict from m to scores [B, C], and `embeddings` [B, E]."""
        outputs = self.head(hidden, embedding=embedding, segment_ids=segment_ids)
        check_dims("dims", self.dims, outputs["embeddings"].shape[-1])
        z = outputs["embeddings"][:, : self.dims[-1]]
        scores = self._tied(z) if self.tie_weights else self._separate(z)
        return {**outputs, "class_logits": scores}

    def _separate(self, z):
        return {m: self._classifier(f"classifier_{m}")(z[:, :m]) for m in self.dims}

    def _tied(self, z):
        # W[:, :m] z[:m] is W z with the later coordinates set to zero; so W stays one `Linear`.
        classifier = self._classifier("classifier")
        coordinate = jnp.arange(z.shape[-1])
        return {m: classifier(jnp.where(coordinate < m, z, 0.0)) for m in self.dims}

    def _classifier(self, name):
        return Linear(self.num_classes, self.use_bias, name=name)
