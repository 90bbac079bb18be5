"""Every token passes the same few blocks several times."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from effjax.depth.sharing import Layout, RecursiveState, run
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

    def init_state(
        self, stack: Stack, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> RecursiveState:
        """Empty decode states: every recursion has its own, although they share parameters."""
        layout = Layout.of(self.sharing, len(stack), self.num_recursions)
        size = (batch_size, max_length, d_model, dtype)
        return layout.init_state(stack, self.num_recursions, *size)

    @nn.compact
    def __call__(
        self,
        stack: Stack,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: RecursiveState | None = None,
        train: bool = False,
    ):
        """Returns (x [B, T, D], the new decode state or None if none was given, aux).

        Raises:
          ValueError: if the layers of the stack do not divide into the recursions.
        """
        layout = Layout.of(self.sharing, len(stack), self.num_recursions)
        first, recursions, last = layout.bind(stack, self)
        runs = (first, *recursions, last)
        states = (None,) * len(runs) if state is None else state.runs()
        outcomes = []
        for stacks, given in zip(runs, states, strict=True):
            x, *outcome = run(
                stacks, x, positions=positions, segment_ids=segment_ids, states=given, train=train
            )
            outcomes.append(outcome)
        new_states, aux = zip(*outcomes, strict=True)
        return x, None if state is None else RecursiveState.of(new_states), scalars.combine(aux)
