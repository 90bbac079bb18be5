"""Contrastive learning of embeddings from pairs, with the other pairs of the batch as negatives."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effjax.heads.matryoshka import check_dims, truncate
from effjax.objectives.matryoshka import nested
from effjax.objectives.randomness import streams
from effjax.registry import describe, register


@register("objective", "contrastive")
def contrastive(
    model,
    variables,
    batch,
    rng: PRNGKeyArray | None,
    *,
    temperature: float = 0.05,
    symmetric: bool = True,
    matryoshka_dims: tuple[int, ...] | None = None,
    matryoshka_weights: tuple[float, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """InfoNCE between the queries and the documents of a batch, plus the model's auxiliary losses.

    One encoder embeds both sides. With `matryoshka_dims` the loss is the weighted sum over those
    prefixes of the embeddings, each cut and normalised anew (arXiv 2205.13147, eq. 1); without, it
    is that of the whole embedding.

    Args:
      model: any model whose head gives embeddings [B, E].
      variables: its variables.
      batch: `query_tokens`, `query_segment_ids`, `document_tokens`, `document_segment_ids`, int32
        [B, T]; pairs with an empty side count for nothing.
      rng: key for routing noise and dropout; None evaluates.
      temperature: what cosines are divided by, > 0.
      symmetric: average with the direction from document to query.
      matryoshka_dims: nested dimensions, increasing, at most E.
      matryoshka_weights: their relative importances; None means 1 each.

    Returns:
      The loss, and metrics: `contrastive` (nats per pair) and `accuracy` (fraction of queries
      nearest to their own document of the batch), under `<name>/<m>` for each of the nested
      dimensions; `weight` (number of pairs); and what the model reports.

    Raises:
      ValueError: for a field out of range, or a model without embeddings.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; valid: more than 0")
    if matryoshka_dims is None and matryoshka_weights is not None:
        raise ValueError(
            f"matryoshka_weights is {matryoshka_weights}; valid: None without matryoshka_dims"
        )
    out, queries, documents = _embed_pairs(model, variables, batch, rng)
    valid, negatives = _comparable(batch)

    def loss_at(dim):
        return info_nce(
            truncate(queries, dim),
            truncate(documents, dim),
            negatives,
            valid,
            temperature=temperature,
            symmetric=symmetric,
        )

    if matryoshka_dims is None:
        loss, metrics = loss_at(queries.shape[-1])
    else:
        check_dims("matryoshka_dims", matryoshka_dims, queries.shape[-1])
        loss, metrics = nested(loss_at, matryoshka_dims, matryoshka_weights)
    weight = jnp.sum(valid, dtype=jnp.float32)
    metrics = {**metrics, "weight": weight, **out.aux, **out.metrics}
    scalars = {name: value for name, value in metrics.items() if jnp.ndim(value) == 0}
    return loss + sum(out.aux.values()), scalars


def info_nce(
    queries: Float[Array, "B E"],
    documents: Float[Array, "B E"],
    negatives: Bool[Array, "B B"],
    valid: Bool[Array, "B"],
    *,
    temperature: float,
    symmetric: bool,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """-log softmax of the own document among the documents of the batch.

    van den Oord et al., 2018, arXiv 1807.03748, eq. 4. The symmetric form averages it with that of
    the own query among the queries (Radford et al., 2021, arXiv 2103.00020, figure 3).

    Args:
      queries: unit vectors.
      documents: unit vectors; row i belongs to query i.
      negatives: whether document j counts as a wrong answer to query i; symmetric, its diagonal is
        not read.
      valid: pairs that the mean is over.
      temperature: what cosines are divided by.
      symmetric: whether to average both directions.

    Returns:
      The mean over the valid pairs in nats, and `contrastive` (the same) and `accuracy`.
    """
    own = jnp.eye(queries.shape[0], dtype=bool)
    cosines = jnp.matmul(queries, documents.T, precision="highest")
    scores = jnp.where(negatives | own, cosines / temperature, -jnp.inf)
    positive = jnp.diagonal(scores)
    nats = jax.nn.logsumexp(scores, axis=1) - positive
    if symmetric:
        nats = (nats + jax.nn.logsumexp(scores, axis=0) - positive) / 2
    correct = jnp.argmax(scores, axis=1) == jnp.arange(queries.shape[0])
    weight = valid / jnp.maximum(jnp.sum(valid), 1)
    loss = jnp.sum(weight * nats)
    return loss, {"contrastive": loss, "accuracy": jnp.sum(weight * correct)}


def _embed_pairs(model, variables, batch, rng):
    """Both sides in one forward pass, query and document of a pair in neighbouring rows.

    Neighbours, and not one side after the other, so that a sharded batch axis stays where it is.
    """

    def interleave(name):
        sides = [batch[f"{side}_{name}"] for side in ("query", "document")]
        return jnp.stack(sides, axis=1).reshape(-1, sides[0].shape[1])

    out = model.apply(
        variables,
        interleave("tokens"),
        segment_ids=interleave("segment_ids"),
        train=rng is not None,
        rngs=streams(rng),
    )
    if out.embeddings is None:
        raise ValueError(
            f"head is {describe(model.head)}; valid for contrastive: one that gives embeddings"
        )
    queries, documents = jnp.moveaxis(out.embeddings.reshape(-1, 2, out.embeddings.shape[-1]), 1, 0)
    return out, queries, documents


def _comparable(batch) -> tuple[Bool[Array, "B"], Bool[Array, "B B"]]:
    """Pairs with text on both sides, and which of them are negatives of each other.

    Two pairs with the same query, or with the same document, are right answers to each other.
    """
    query, document = (
        jnp.where(batch[f"{side}_segment_ids"] > 0, batch[f"{side}_tokens"], -1)
        for side in ("query", "document")
    )
    valid = jnp.any(query >= 0, axis=1) & jnp.any(document >= 0, axis=1)
    return valid, valid[:, None] & valid & ~_equal_rows(query) & ~_equal_rows(document)


def _equal_rows(tokens: Int[Array, "B T"]) -> Bool[Array, "B B"]:
    return jnp.all(tokens[:, None] == tokens, axis=-1)
