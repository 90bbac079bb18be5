"""Texts in, embeddings out: a trained text encoder behind a server."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from effjax.heads import truncate
from effjax.models import SequenceModel
from effjax.serving.prompts import check_prompt, pad


class Embedder:
    """A text encoder with its variables; safe to call from several threads.

    Attributes:
      size: coordinates of an embedding.
      max_length: tokens of a text.
    """

    def __init__(self, model: SequenceModel, variables: Any, *, max_batch: int = 32):
        """Raises ValueError for a model whose head gives no embeddings."""
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}; valid: at least 1")
        self._apply = jax.jit(
            lambda variables, tokens, segment_ids: (
                model.apply(variables, tokens, segment_ids=segment_ids).embeddings
            )
        )
        one = jax.ShapeDtypeStruct((1, 1), np.int32)
        shape = jax.eval_shape(self._apply, variables, one, one)
        if shape is None:
            raise ValueError(
                f"the model has the head {type(model.head).__name__}, which gives no embeddings; valid: embedding"
            )
        self.size = shape.shape[-1]
        self.max_length = model.max_seq_len
        self._vocab_size = model.vocab_size
        self._variables = variables
        self._max_batch = max_batch

    def __call__(
        self, texts: Sequence[Int[np.ndarray, " n"]], dimensions: int | None = None
    ) -> Float[np.ndarray, "N E"]:
        """Unit vectors of texts, of the first `dimensions` coordinates (Matryoshka truncation).

        Args:
          texts: token ids of each.
          dimensions: None for all.

        Raises:
          ValueError: for a text that is empty, too long or has ids that are not in the vocabulary, or for more
            dimensions than there are.
        """
        if dimensions is not None and not 1 <= dimensions <= self.size:
            raise ValueError(f"dimensions={dimensions}; valid: 1 to {self.size}")
        texts = [self._checked(index, text) for index, text in enumerate(texts)]
        # Texts of like length share a batch, so that little is padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found = np.empty((len(texts), self.size), np.float32)
        for start in range(0, len(order), self._max_batch):
            batch = order[start : start + self._max_batch]
            found[batch] = self._embed([texts[index] for index in batch])
        return np.asarray(truncate(found, dimensions or self.size))

    def _checked(self, index: int, text: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        text = check_prompt(f"input[{index}]", text, self._vocab_size)
        if len(text) > self.max_length:
            raise ValueError(
                f"input[{index}] has {len(text)} tokens; valid: 1 to {self.max_length}"
            )
        return text

    def _embed(self, texts):
        # Powers of two in both axes, so that there are few programs.
        num_rows = 1 << (len(texts) - 1).bit_length()
        tokens, lengths = pad(texts, self.max_length)
        tokens = np.pad(tokens, ((0, num_rows - len(texts)), (0, 0)))
        lengths = np.pad(lengths, (0, num_rows - len(texts)))
        segment_ids = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
        return np.asarray(self._apply(self._variables, tokens, segment_ids))[: len(texts)]
