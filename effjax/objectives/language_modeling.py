"""Next-token prediction."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from effjax.objectives.randomness import streams
from effjax.registry import register


@register("objective", "next_token")
def next_token(
    model, variables, batch, rng: PRNGKeyArray | None, *, z_loss: float = 0.0
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of the next token over the unmasked targets, plus the model's auxiliary losses.

    Args:
      model: any model whose head gives logits.
      variables: its variables.
      batch: `tokens`, `targets`, `positions`, `segment_ids` int32 [B, T] and `loss_mask` float32 [B, T].
      rng: key for routing noise and dropout; None evaluates.
      z_loss: weight of log(Z)^2, which keeps the softmax normaliser near 1 (PaLM, arXiv 2204.02311, section 5).

    Returns:
      The loss in nats per target, and metrics: `cross_entropy` (nats per target), `weight` (number of targets, by which
      means over batches must be weighted) and what the model reports.
    """
    out = model.apply(
        variables,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        train=rng is not None,
        rngs=streams(rng),
    )
    mask = batch["loss_mask"]
    weight = jnp.sum(mask)
    targets = batch["targets"]
    if getattr(model.head, "chunk_size", None) is None:
        nats = optax.softmax_cross_entropy_with_integer_labels(out.logits, targets)
        log_z = jax.nn.logsumexp(out.logits, axis=-1)
    else:
        nats, log_z = model.apply(variables, out.hidden, targets, method="cross_entropy")
    cross_entropy = jnp.sum(nats * mask) / jnp.maximum(weight, 1.0)
    loss = cross_entropy + sum(out.aux.values())
    if z_loss:
        loss = loss + z_loss * jnp.sum(jnp.square(log_z) * mask) / jnp.maximum(weight, 1.0)
    metrics = {"cross_entropy": cross_entropy, "weight": weight, **out.aux, **out.metrics}
    return loss, {name: value for name, value in metrics.items() if jnp.ndim(value) == 0}
