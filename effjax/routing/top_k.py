"""Token choice: every token takes the experts that score highest for it."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Assignment:
    """Which experts each token goes to, and with what weight.

    Attributes:
      indices: [..., K] int32, the chosen experts, best score first, each at most once. Numbers from
        `num_experts` on are null experts, which give zero.
      weights: [..., K] float32, the factor of each chosen expert's output; 0 for null experts.
      probs: [..., E + M] float32, softmax of the scores over the E true and the M null experts.
      num_experts: E.
    """

    indices: Int[Array, "... K"]
    weights: Float[Array, "... K"]
    probs: Float[Array, "... EM"]
    num_experts: int = flax.struct.field(pytree_node=False)

    @property
    def true(self) -> Bool[Array, "... K"]:
        """Which of the choices are true experts."""
        return self.indices < self.num_experts

    def only(self, mask: Bool[Array, "..."]) -> "Assignment":
        """The assignment of the tokens marked by `mask`; the others go to no expert at all."""
        nobody = self.probs.shape[-1]
        return dataclasses.replace(
            self,
            indices=jnp.where(mask[..., None], self.indices, nobody),
            weights=jnp.where(mask[..., None], self.weights, 0.0),
        )


def switch(logits: Float[Array, "... E"]) -> Assignment:
    """The one best expert, weighted by its probability (arXiv 2101.03961, section 2.1, eq. 1-2).

    The weight is p_i itself: renormalised over the one expert chosen it would always be 1, and the
    router would get no gradient from the output.

    Args:
      logits: scores, [..., E], float32.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    indices = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
    weights = jnp.take_along_axis(probs, indices, axis=-1)
    return Assignment(indices, weights, probs, logits.shape[-1])


def top_k(
    logits: Float[Array, "... EM"],
    k: int,
    *,
    num_null: int = 0,
    bias: Float[Array, "EM"] | None = None,
) -> Assignment:
    """The k best experts, weighted by their probabilities renormalised over the true ones chosen.

    Without null experts this is the softmax-top-k-renormalise of Mixtral (arXiv 2401.04088,
    section 2.1). With them it is AdaMoE (arXiv 2406.13233): a token that picks j null experts
    spends k - j true ones, and one that picks nothing but null experts gets no weight at all.

    Args:
      logits: scores of the true experts, then of the null ones, [..., E + M], float32.
      k: experts a token.
      num_null: M.
      bias: [E + M], added to the probabilities for the choice but not in the weights
        (`effjax.routing.balance.loss_free_bias_loss`).

    Raises:
      ValueError: if k is not among 1 ... E + M, or there is no true expert.
    """
    total = logits.shape[-1]
    check_choices(k, total - num_null, num_null)
    probs = jax.nn.softmax(logits, axis=-1)
    # Scores order the experts as probabilities do, and still tell them apart where these underflow.
    preference = logits if bias is None else probs + bias
    # A sort: over a mesh the compiler splits it by token, whereas for top_k it gathers all scores.
    order = jnp.argsort(jax.lax.stop_gradient(preference), axis=-1, descending=True)
    indices = order[..., :k].astype(jnp.int32)
    true = indices < total - num_null
    # The renormalised probabilities are the softmax over the choice: finite for any scores.
    chosen = jnp.take_along_axis(logits, indices, axis=-1)
    masked = jnp.where(true, chosen, jnp.finfo(chosen.dtype).min)
    weights = jnp.where(true, jax.nn.softmax(masked, axis=-1), 0.0)
    return Assignment(indices, weights, probs, total - num_null)


def check_choices(k: int, num_experts: int, num_null: int = 0) -> None:
    """Raises ValueError unless k experts can be chosen out of `num_experts` and `num_null`."""
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}; valid: at least 1")
    if num_null < 0:
        raise ValueError(f"num_null={num_null}; valid: at least 0")
    if not 1 <= k <= num_experts + num_null:
        raise ValueError(
            f"top_k={k}; valid: 1 to {num_experts + num_null}, "
            f"the number of experts (num_experts={num_experts}, num_null={num_null})"
        )
