"""Retrieval with nested embeddings: exact search, and cheaper search that starts small.

Adaptive retrieval (Kusupati et al., 2022, arXiv 2205.13147, section 4.3.1) takes a shortlist by the
first few coordinates and orders it anew by more of them; funnel retrieval, in the same section,
repeats that with ever shorter lists and ever more coordinates. All are one cascade of stages, of
which full search has one and adaptive retrieval two.

Results are tidy: a list of dicts, one for each setting and k, for tables and plots.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.heads.matryoshka import check_dims, truncate

AnyArray = Array | np.ndarray
Rows = list[dict[str, Any]]


def search(
    queries: Float[AnyArray, "Q E"],
    documents: Float[AnyArray, "N E"],
    *,
    dims: Sequence[int],
    sizes: Sequence[int],
    chunk_size: int = 256,
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """Nearest documents by cosine, through a cascade of stages; exact in each of them.

    Stage 0 compares a query with all documents in the first `dims[0]` coordinates and keeps the
    best `sizes[0]`; stage i compares it with those that stage i - 1 kept, in the first `dims[i]`,
    and keeps `sizes[i]`. Ties go to the lower id.

    Args:
      queries: embeddings of the queries, of any length.
      documents: embeddings of the documents, of any length.
      dims: coordinates that each stage looks at, increasing.
      sizes: documents that each stage keeps, never more than the stage before.
      chunk_size: queries that are compared at a time; memory grows with chunk_size * N.

    Returns:
      Cosines in the last stage's coordinates, best first, and ids of the documents; K = sizes[-1].

    Raises:
      ValueError: naming the field that does not fit.
    """
    dims, sizes = tuple(dims), tuple(sizes)
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries are {queries.shape} and documents {documents.shape}; valid: [Q, E] and [N, E]"
        )
    check_dims("dims", dims, documents.shape[1])
    count = documents.shape[0]
    shrinking = all(a >= b for a, b in zip((count, *sizes), (*sizes, 1), strict=True))
    if len(sizes) != len(dims) or not shrinking:
        raise ValueError(
            f"sizes is {sizes}; valid: {len(dims)} counts, one a stage, never increasing, "
            f"from {count} (the documents) to 1"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; valid: 1 or more")
    return _search(jnp.asarray(queries), jnp.asarray(documents), dims, sizes, chunk_size)


@functools.partial(jax.jit, static_argnames=("dims", "sizes", "chunk_size"))
def _search(queries, documents, dims, sizes, chunk_size):
    cut = [truncate(documents, dim) for dim in dims]

    def search_one(query):
        scores, ids = jax.lax.top_k(_dot(cut[0], truncate(query, dims[0])), sizes[0])
        for documents_m, dim, size in zip(cut[1:], dims[1:], sizes[1:], strict=True):
            ids = jnp.sort(ids)  # so that ties go to the lower id, as they do in a full search
            scores, best = jax.lax.top_k(_dot(documents_m[ids], truncate(query, dim)), size)
            ids = ids[best]
        return scores, ids

    return jax.lax.map(search_one, queries, batch_size=chunk_size)


def _dot(documents, query):
    return jnp.matmul(documents, query, precision="highest")


def multiply_adds(num_documents: int, dims: Sequence[int], sizes: Sequence[int]) -> int:
    """Multiply-adds of the dot products of a query in `search`: N dims[0] + sizes[0] dims[1] + ...

    Cutting and normalising the documents belongs to building the index, and selecting the best
    multiplies nothing.
    """
    compared = (num_documents, *sizes[:-1])
    return sum(n * dim for n, dim in zip(compared, dims, strict=True))


def recall(
    found: Int[AnyArray, "Q K"], relevant: Int[AnyArray, "Q R"], ks: Sequence[int]
) -> dict[int, float]:
    """Fraction of the relevant documents among the first k found, averaged over the queries.

    Args:
      found: ids of documents, best first.
      relevant: ids of each query's relevant documents, [Q] if there is one each, filled up with -1.
      ks: cut-offs, within 1..K.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    found, relevant = np.asarray(found), np.asarray(relevant)
    relevant = relevant[:, None] if relevant.ndim == 1 else relevant
    if relevant.ndim != 2 or len(relevant) != len(found):
        raise ValueError(
            f"relevant is {relevant.shape}; valid: [{len(found)}] or [{len(found)}, R]"
        )
    exists = relevant >= 0
    if not exists.any(axis=1).all():
        row = int(np.argmin(exists.any(axis=1)))
        raise ValueError(f"relevant[{row}] is {relevant[row]}; valid: one or more ids of documents")
    _check_cutoffs(ks, found.shape[1])
    hits = (found[:, :, None] == relevant[:, None, :]) & exists[:, None, :]
    share = hits.any(axis=2).cumsum(axis=1) / exists.sum(axis=1, keepdims=True)
    return {k: float(share[:, k - 1].mean()) for k in ks}


def recall_at_k(
    queries: Float[AnyArray, "Q E"],
    documents: Float[AnyArray, "N E"],
    relevant: Int[AnyArray, "Q R"],
    *,
    dims: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> Rows:
    """Recall@k of exact search by the first m coordinates, for each m in `dims`.

    Args:
      queries: embeddings of the queries.
      documents: embeddings of the documents.
      relevant: see `recall`.
      dims: numbers of coordinates, increasing.
      ks: cut-offs.

    Returns:
      A dict of method "full", dims, sizes, k, recall and multiply_adds (a query) for each m and k.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    check_dims("dims", dims, documents.shape[1])
    data = (queries, documents, relevant)
    return [row for dim in dims for row in _measure("full", *data, (dim,), (), ks)]


def adaptive_retrieval(
    queries: Float[AnyArray, "Q E"],
    documents: Float[AnyArray, "N E"],
    relevant: Int[AnyArray, "Q R"],
    *,
    shortlist_dim: int,
    shortlist_size: int,
    rerank_dim: int,
    ks: Sequence[int] = (1, 5, 10),
) -> Rows:
    """Recall@k and cost of a shortlist by `shortlist_dim` coordinates, ordered by `rerank_dim`.

    Returns rows as `recall_at_k` does, of method "adaptive", and raises as it does.
    """
    dims = (shortlist_dim, rerank_dim)
    check_dims("(shortlist_dim, rerank_dim)", dims, documents.shape[1])
    return _measure("adaptive", queries, documents, relevant, dims, (shortlist_size,), ks)


def funnel_retrieval(
    queries: Float[AnyArray, "Q E"],
    documents: Float[AnyArray, "N E"],
    relevant: Int[AnyArray, "Q R"],
    *,
    dims: Sequence[int],
    shortlist_size: int,
    ks: Sequence[int] = (1, 5, 10),
) -> Rows:
    """Recall@k and cost of a funnel, whose shortlist halves at each of `dims` after the first.

    The list never gets shorter than the largest k.

    Returns rows as `recall_at_k` does, of method "funnel", and raises as it does.
    """
    check_dims("dims", dims, documents.shape[1])
    halves = (max(shortlist_size >> i, *ks) for i in range(1, len(dims) - 1))
    shortlists = (shortlist_size, *halves)[: len(dims) - 1]
    return _measure("funnel", queries, documents, relevant, tuple(dims), shortlists, ks)


def adaptive_curve(
    queries: Float[AnyArray, "Q E"],
    documents: Float[AnyArray, "N E"],
    relevant: Int[AnyArray, "Q R"],
    *,
    dims: Sequence[int],
    shortlist_sizes: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> Rows:
    """Recall against cost: full search by each dimension, adaptive retrieval, and funnels.

    Args:
      queries: embeddings of the queries.
      documents: embeddings of the documents.
      relevant: see `recall`.
      dims: the nested dimensions; a shortlist is taken by each but the last, which ranks it.
      shortlist_sizes: lengths of the first shortlist.
      ks: cut-offs.

    Returns:
      The rows of `recall_at_k`, `adaptive_retrieval` and `funnel_retrieval`.
    """
    data = (queries, documents, relevant)
    rows = recall_at_k(*data, dims=dims, ks=ks)
    for size in shortlist_sizes:
        for dim in dims[:-1]:
            rows += adaptive_retrieval(
                *data, shortlist_dim=dim, shortlist_size=size, rerank_dim=dims[-1], ks=ks
            )
        if len(dims) > 2:
            rows += funnel_retrieval(*data, dims=dims, shortlist_size=size, ks=ks)
    return rows


def _measure(method, queries, documents, relevant, dims, shortlists, ks) -> Rows:
    """The rows of one cascade that keeps `shortlists` and then the largest k."""
    count = len(documents)
    _check_cutoffs(ks, count)
    for size in shortlists:
        if not max(ks) <= size <= count:
            raise ValueError(
                f"shortlist_size is {size}; valid: from {max(ks)} (the largest k) to {count} "
                "(the documents)"
            )
    if np.max(relevant) >= count:
        raise ValueError(
            f"relevant has {np.max(relevant)}; valid: ids below the number of documents {count}"
        )
    sizes = (*shortlists, max(ks))
    _, found = search(queries, documents, dims=dims, sizes=sizes)
    shares = recall(found, relevant, ks)
    setting = {"method": method, "dims": dims, "sizes": sizes}
    cost = multiply_adds(count, dims, sizes)
    return [{**setting, "k": k, "recall": shares[k], "multiply_adds": cost} for k in ks]


def _check_cutoffs(ks, largest):
    if not ks or not all(1 <= k <= largest for k in ks):
        raise ValueError(f"ks is {ks}; valid: one or more cut-offs from 1 to {largest}")
