"""Every token passes the same few blocks several times."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from effjax.depth.sharing import Layout, run
from effjax.depth.stack import Stack
from effjax.nn import scalars
from effjax.registry import register


@register("depth", "recursive")
class Recursive(nn.Module):
    """A recursive Transformer: parameters shared across depth, computation as in the plain one.

    Universal Transformers (Dehghani et al., 2019, arXiv 1807.03819) share one block; the strategies here are those of
    Mixture-of-Recursions (Bae et al., 2025, arXiv 2507.10524), whose baseline this is.

    Attributes:
      num_recursions: how often the shared blocks are applied.
      sharing: which layers share parameters, one of `sharing.STRATEGIES`.
    """

    num_recursions: int = 3
    sharing: str = "middle_cycle"

    @nn.compact
    def __call__(
        self,
        stack: Stack,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        train: bool = False,
    ):
        """Returns (x [B, T, D], aux).

        Raises:
          ValueError: if the layers of the stack do not divide into the recursions.
        """
        layout = Layout.of(self.sharing, len(stack), self.num_recursions)
        first, recursions, last = layout.bind(stack, self)
        reports = []
        for stacks in (first, *recursions, last):
            x, _, aux = run(stacks, x, positions=positions, segment_ids=segment_ids, train=train)
            reports.append(aux)
        return x, scalars.combine(reports)
