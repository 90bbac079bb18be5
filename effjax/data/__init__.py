"""Data: sources, tokenizers, packing; deterministic, resumable, shared out by rows.

config = effjax.data.default_config()
for batch in effjax.data.build(config, split="train"):
    batch["tokens"]  # int32 [B, T]
"""

from effjax.data import ngrams
from effjax.data.recipe import DataIterator, DataRecipe, build, default_config, documents, tokenizer
from effjax.data.streams import joined_state
from effjax.data.tokenizers import Tokenizer

__all__ = [
    "DataIterator",
    "DataRecipe",
    "Tokenizer",
    "build",
    "default_config",
    "documents",
    "joined_state",
    "ngrams",
    "tokenizer",
]
