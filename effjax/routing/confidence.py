"""How sure the router is, and the loss that keeps it from being too loud about it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.routing.balance import TokenMask, token_mean


def router_z_loss(logits: Float[Array, "... E"], mask: TokenMask = None) -> Float[Array, ""]:
    """Mean of (log sum_i exp x_i)^2: keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
      logits: float32 scores of the router.
      mask: tokens that count, [...]; None counts them all.
    """
    return token_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), mask)


def router_entropy(probs: Float[Array, "... E"], mask: TokenMask = None) -> Float[Array, ""]:
    """Mean entropy, in nats, of the choice for a token: 0 when sure, log E when knowing nothing.

    Args:
      probs: softmax over the experts, float32.
      mask: tokens that count, [...]; None counts them all.
    """
    return token_mean(jnp.sum(jax.scipy.special.entr(probs), axis=-1), mask)
