"""Classification of whole texts."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effjax.objectives.matryoshka import nested
from effjax.objectives.randomness import streams
from effjax.registry import describe, register


@register("objective", "classification")
def classification(
    model,
    variables,
    batch,
    rng: PRNGKeyArray | None,
    *,
    matryoshka_weights: tuple[float, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of the class, plus the model's auxiliary losses.

    It is summed over the nested dimensions of the head (arXiv 2205.13147, eq. 1).

    Args:
      model: any model whose head gives class scores (`heads.MatryoshkaClassifier`, MRL or MRL-E).
      variables: its variables.
      batch: `tokens` and `segment_ids` int32 [B, T], `labels` int32 [B]; rows that are all padding
        count for nothing.
      rng: key for routing noise and dropout; None evaluates.
      matryoshka_weights: relative importances of the head's dimensions; None means 1 each.

    Returns:
      The loss, and metrics: `cross_entropy` (nats per text) and `accuracy` under `<name>/<m>` for
      each nested dimension; `weight` (number of texts); and what the model reports.

    Raises:
      ValueError: for weights that do not fit the dimensions, or a model without class scores.
    """
    out = model.apply(
        variables,
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        train=rng is not None,
        rngs=streams(rng),
    )
    if out.class_logits is None:
        raise ValueError(
            f"head is {describe(model.head)}; valid for classification: one that gives class scores"
        )
    valid = jnp.any(batch["segment_ids"] > 0, axis=1)

    def loss_at(dim):
        return cross_entropy(out.class_logits[dim], batch["labels"], valid)

    loss, metrics = nested(loss_at, tuple(out.class_logits), matryoshka_weights)
    weight = jnp.sum(valid, dtype=jnp.float32)
    metrics = {**metrics, "weight": weight, **out.aux, **out.metrics}
    scalars = {name: value for name, value in metrics.items() if jnp.ndim(value) == 0}
    return loss + sum(out.aux.values()), scalars


def cross_entropy(
    logits: Float[Array, "B C"], labels: Int[Array, "B"], valid: Bool[Array, "B"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean over the valid rows in nats, and `cross_entropy` (the same) and `accuracy`."""
    labels = jnp.where(valid, labels, 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weight = valid / jnp.maximum(jnp.sum(valid), 1)
    loss = jnp.sum(weight * nats)
    accuracy = jnp.sum(weight * (jnp.argmax(logits, axis=-1) == labels))
    return loss, {"cross_entropy": loss, "accuracy": accuracy}
