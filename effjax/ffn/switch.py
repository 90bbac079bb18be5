"""Switch Transformer: one expert a token (Fedus et al., 2021, arXiv 2101.03961)."""

import dataclasses

import jax

from effjax.ffn.mixture import MixtureOfExperts
from effjax.registry import register
from effjax.routing import top_k
from effjax.routing.balance import load_balancing_loss


@register("ffn", "switch")
class Switch(MixtureOfExperts):
    """y = p_i(x) E_i(x), where i is the one expert with the largest p(x) = softmax(W x).

    - Capacity (eq. 3): tokens / experts * capacity_factor rows an expert. A token that finds its
      expert full gets 0: the residual connection carries it on.
    - Balance (eq. 4): alpha * E * sum_i f_i P_i, with alpha = `balance_weight` = 0.01.
    - Stability (section 2.4): the router works in float32, initialisers are scaled by 0.1.
    - Exploration (appendix C): input jitter.

    The z-loss (ST-MoE, arXiv 2202.08906, eq. 5) came later; `z_weight=0` leaves it out. Experts
    are T5's dense ReLU feed-forwards.

    Attributes:
      renormalise: y = E_i(x), the weight renormalised over the one expert chosen, which is 1. Copies of a
        dense feed-forward then begin as the same function (`effjax.models.uptraining`). So that the router
        learns from the output all the same, the weight has the gradient of log p_i(x).

    Further fields: see `MixtureOfExperts`.
    """

    gated: bool = False
    activation: str = "relu"
    jitter: float = 0.01
    init_scale: float = 0.1
    renormalise: bool = False

    @property
    def choices(self) -> int:
        return 1

    def route(self, logits, mask):
        assignment = top_k.switch(logits)
        if self.renormalise:
            p = assignment.weights
            assignment = dataclasses.replace(assignment, weights=p / jax.lax.stop_gradient(p))
        balance = load_balancing_loss(assignment.probs, assignment.indices, mask=mask)
        return assignment, {"loss/load_balancing": self.balance_weight * balance}
