"""AdaMoE: as many experts as the token needs (Zeng et al., 2024, arXiv 2406.13233)."""

from effjax.ffn.mixture import MixtureOfExperts
from effjax.registry import register
from effjax.routing import top_k
from effjax.routing.balance import load_balancing_loss


@register("ffn", "adamoe")
class AdaMoE(MixtureOfExperts):
    """Top-k over E true experts and M null ones, which give zero and cost nothing.

    A larger k than that of a plain mixture leaves it to the token how many of its k choices are
    true experts: y = sum of w_i E_i(x) over the true experts chosen, w renormalised over these
    alone. A token that chooses null experts only gets 0. The load-balancing loss charges each null
    expert the average load of all of them, so it fixes how many null experts are used on average
    (even load: k * M / (E + M) a token) and leaves the spread over tokens free.

    With `dispatch="capacity"`, buffers are sized for the k * E / (E + M) true experts that a token
    takes on average, times `capacity_factor`: this is where the time is saved. `flops/full` is the
    cost of k true experts for every token.

    Attributes:
      top_k: k, choices a token.
      num_null: M.

    Further fields: see `MixtureOfExperts`.
    """

    top_k: int = 4
    num_null: int = 8

    @property
    def choices(self) -> int:
        return self.top_k

    @property
    def nulls(self) -> int:
        return self.num_null

    def route(self, logits, mask):
        assignment = top_k.top_k(logits, self.top_k, num_null=self.num_null)
        balance = load_balancing_loss(
            assignment.probs, assignment.indices, num_null=self.num_null, mask=mask
        )
        return assignment, {"loss/load_balancing": self.balance_weight * balance}
