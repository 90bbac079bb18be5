"""Heads: `(hidden[B, T, D], *, embedding[V, D], segment_ids) -> {"logits": ...} or {"embeddings": ...}`."""

from effjax.heads.embedding import Embedding
from effjax.heads.language_model import Tied, Untied
from effjax.heads.matryoshka import MatryoshkaClassifier, truncate

__all__ = ["Embedding", "MatryoshkaClassifier", "Tied", "Untied", "truncate"]
