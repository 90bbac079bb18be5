"""Retrieval of documents by their queries, with the embeddings of a model on held-out pairs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from effjax import processes
from effjax.evaluation import retrieval

KS = (1, 5, 10)
SHORTLIST_SIZES = (16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Held-out pairs as vectors. Texts that occur in several pairs are here once.

    Attributes:
      queries: float32 [Q, E].
      documents: float32 [N, E].
      relevant: int32 [Q, R] the documents that each query is paired with, filled up with -1.
    """

    queries: np.ndarray
    documents: np.ndarray
    relevant: np.ndarray


def embed_pairs(
    forward: Callable[..., tuple[Float[Array, "B E"], Any]],
    variables: Any,
    batches: Iterable[Mapping[str, Array]],
) -> Embedded:
    """Embeds both sides of held-out pairs; pairs with an empty side are left out.

    Args:
      forward: `(variables, inputs) -> (embeddings, metrics)` (`forward.compile_forward`).
      variables: of the model.
      batches: batches of pairs.

    Raises:
      ValueError: if there is no pair.
    """
    sides = {"query": _Texts(), "document": _Texts()}
    pairs: dict[tuple[int, int], None] = {}  # ordered, each once
    for batch in batches:
        texts = processes.fetch(dict(batch))
        masks = [texts[f"{side}_segment_ids"] > 0 for side in sides]
        kept = np.flatnonzero(masks[0].any(axis=1) & masks[1].any(axis=1))
        ids = []
        for side, mask in zip(sides, masks, strict=True):
            inputs = {name: batch[f"{side}_{name}"] for name in ("tokens", "segment_ids")}
            vectors = np.asarray(processes.fetch(forward(variables, inputs)[0]), np.float32)
            tokens = texts[f"{side}_tokens"]
            keys = [tokens[row][mask[row]].tobytes() for row in kept]
            ids.append([sides[side].add(k, vectors[r]) for k, r in zip(keys, kept, strict=True)])
        pairs.update(dict.fromkeys(zip(*ids, strict=True)))
    if not pairs:
        raise ValueError("batches have no pair with text on both sides; valid: one or more")
    queries, documents = (np.stack(side.vectors) for side in sides.values())
    return Embedded(queries, documents, _relevant(pairs, len(queries)))


def nested_dims(size: int, dims: Sequence[int] | None = None) -> tuple[int, ...]:
    """The dimensions to report: those that the model was trained for, or halvings of `size` to 8."""
    if dims:
        return tuple(dims)
    halvings = [size >> i for i in range(size.bit_length()) if size >> i >= min(8, size)]
    return tuple(sorted(halvings))


def evaluate_retrieval(embedded: Embedded, dims: Sequence[int]) -> retrieval.Rows:
    """Recall@{1,5,10} by dimension, and the curve of adaptive retrieval.

    Cut-offs and shortlists that the number of documents does not allow are left out.

    Returns:
      The rows of `retrieval.adaptive_curve`.
    """
    count = len(embedded.documents)
    ks = [k for k in KS if k <= count]
    sizes = [size for size in SHORTLIST_SIZES if max(ks) <= size <= count]
    return retrieval.adaptive_curve(
        embedded.queries,
        embedded.documents,
        embedded.relevant,
        dims=tuple(dims),
        shortlist_sizes=sizes,
        ks=ks,
    )


class _Texts:
    """Different texts in the order of their first occurrence."""

    def __init__(self):
        self.ids: dict[bytes, int] = {}
        self.vectors: list[Float[np.ndarray, " E"]] = []

    def add(self, text: bytes, vector: np.ndarray) -> int:
        if text not in self.ids:
            self.ids[text] = len(self.ids)
            self.vectors.append(vector)
        return self.ids[text]


def _relevant(pairs: Iterable[tuple[int, int]], num_queries: int) -> Int[np.ndarray, "Q R"]:
    lists: list[list[int]] = [[] for _ in range(num_queries)]
    for query, document in pairs:
        lists[query].append(document)
    relevant = np.full((num_queries, max(map(len, lists))), -1, np.int32)
    for row, documents in zip(relevant, lists, strict=True):
        row[: len(documents)] = documents
    return relevant
