"""Keeping the load of the experts even: by a loss on the router, or by a bias on its scores.

All functions take tokens in any number of leading axes. `mask` [...] marks the tokens that count
(1 or True); None counts them all. "Experts" are whatever the router chooses among: feed-forwards,
recursion depths, ...
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TokenMask = Bool[Array, "..."] | Float[Array, "..."] | None


def load(
    indices: Int[Array, "... K"], num_experts: int, mask: TokenMask = None
) -> Float[Array, "E"]:
    """Share of all assignments that each expert gets: float32 [E] that sums to one.

    Args:
      indices: the experts that each token chose; one outside `range(num_experts)` is nobody's.
      num_experts: number of experts to choose from (null ones included).
      mask: tokens that count.
    """
    counts = jax.nn.one_hot(indices, num_experts, dtype=jnp.float32)
    if mask is not None:
        counts = counts * mask[..., None, None]
    counts = jnp.sum(counts, axis=tuple(range(counts.ndim - 1)))
    return counts / jnp.maximum(jnp.sum(counts), 1.0)


def load_balancing_loss(
    probs: Float[Array, "... E"],
    indices: Int[Array, "... K"],
    *,
    num_null: int = 0,
    mask: TokenMask = None,
) -> Float[Array, ""]:
    """E * sum_i f_i P_i (Switch Transformer, arXiv 2101.03961, eq. 4-6), not yet weighted.

    f_i is the share of the assignments that goes to expert i (no gradient flows through it) and
    P_i the mean probability that the router gives it. With even shares or even probabilities the
    loss is 1, whatever K is.

    The last `num_null` experts are AdaMoE's null experts (arXiv 2406.13233). Each of them is
    charged their average load instead of its own: which null expert a token takes makes no
    difference, so only their share as a whole is held against the true experts, and each token
    stays free to take many of them or few.

    Args:
      probs: softmax over all experts, float32.
      indices: the experts that each token chose.
      num_null: how many of the E experts, the last ones, are null.
      mask: tokens that count.
    """
    num_experts = probs.shape[-1]
    f = load(indices, num_experts, mask)
    if num_null:
        true, null = jnp.split(f, [num_experts - num_null])
        f = jnp.concatenate([true, jnp.full_like(null, jnp.mean(null))])
    return num_experts * token_mean(jnp.sum(probs * f, axis=-1), mask)


def loss_free_bias_loss(load: Float[Array, "E"], bias: Float[Array, "E"]) -> Float[Array, ""]:
    """A term worth 0 whose gradient is the update of auxiliary-loss-free balancing.

    Algorithm 1 of arXiv 2408.15664 updates b_i <- b_i + u * sign(mean load - load_i) after every
    step, and adds b to the scores for the choice of experts only. Here the gradient with respect
    to b_i is sign(load_i - mean load) and nothing else gets one, so plain gradient descent with
    the learning rate u is that rule. The parameter is to be called `balance_bias`: the optimizer
    knows it by that name and gives it plain descent at a rate of its own, outside clipping,
    momentum and weight decay.

    Args:
      load: how much each expert had to do, in any unit (see the function `load`).
      bias: the parameter `balance_bias`.
    """
    direction = jax.lax.stop_gradient(jnp.sign(load - jnp.mean(load)))
    return jnp.sum(direction * (bias - jax.lax.stop_gradient(bias)))


def token_mean(values: Float[Array, "..."], mask: TokenMask = None) -> Float[Array, ""]:
    """Mean over the tokens that count; 0 if there are none."""
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)
