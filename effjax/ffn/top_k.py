"""The plain mixture of experts: a fixed number of experts a token."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from effjax.ffn.mixture import MixtureOfExperts
from effjax.registry import register, unknown
from effjax.routing import top_k
from effjax.routing.balance import load, load_balancing_loss, loss_free_bias_loss

BALANCING = ("loss", "bias")


@register("ffn", "top_k")
class TopK(MixtureOfExperts):
    """y = sum of w_i E_i(x) over the k best experts, w renormalised over these (arXiv 2401.04088).

    Attributes:
      top_k: k, experts a token.
      renormalise: whether the k weights sum to 1; if not, they are the probabilities of the softmax over all experts
        (OLMoE, arXiv 2409.02060).
      balancing: "loss" adds `balance_weight` * E * sum_i f_i P_i to the objective (arXiv
        2101.03961, eq. 4); "bias" moves a bias that only the choice of experts sees, so the router
        gets no gradient but the model's (arXiv 2408.15664). `balance_weight` is of no use then.

    Further fields: see `MixtureOfExperts`.
    """

    top_k: int = 2
    renormalise: bool = True
    balancing: str = "loss"

    def __post_init__(self):
        super().__post_init__()
        if self.balancing not in BALANCING:
            raise ValueError(unknown("balancing", self.balancing, BALANCING))

    @property
    def choices(self) -> int:
        return self.top_k

    def route(self, logits, mask):
        if self.balancing == "loss":
            assignment = self._choose(logits)
            balance = load_balancing_loss(assignment.probs, assignment.indices, mask=mask)
            return assignment, {"loss/load_balancing": self.balance_weight * balance}
        zeros = nn.initializers.zeros_init()
        bias = self.param("balance_bias", zeros, (self.num_experts,), jnp.float32)
        assignment = self._choose(logits, bias)
        loads = load(assignment.indices, self.num_experts, mask)
        return assignment, {"loss/balance_bias": loss_free_bias_loss(loads, bias)}

    def _choose(self, logits, bias=None):
        assignment = top_k.top_k(logits, self.top_k, bias=bias)
        if self.renormalise:
            return assignment
        weights = jnp.take_along_axis(assignment.probs, assignment.indices, axis=-1)
        return dataclasses.replace(assignment, weights=weights)
