"""Every token passes the same few blocks several times."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.depth.depthwise import Depthwise
from effjax.depth.sharing import Layout, RecursiveState, run
from effjax.depth.stack import Stack
from effjax.nn import scalars
from effjax.registry import register


@register("depth", "recursive")
class Recursive(Depthwise):
    """A recursive Transformer: parameters shared across depth, computation as in the plain one.

    Universal Transformers (Dehghani et al., 2019, arXiv 1807.03819) share one block; the strategies here are those of
    Mixture-of-Recursions (Bae et al., 2025, arXiv 2507.10524), whose baseline this is.

    Attributes:
      num_recursions: how often the shared blocks are applied.
      sharing: which layers share parameters, one of `sharing.STRATEGIES` or `sharing.UNTIED`.
    """

    num_recursions: int = 3
    sharing: str = "middle_cycle"

    def layout(self, stack: Stack) -> Layout:
        """Raises ValueError if the layers of the stack do not divide into the recursions."""
        return Layout.of(self.sharing, len(stack), self.num_recursions)

    def num_states(self) -> int:
        """All of them."""
        return self.num_recursions

    def itinerary(self) -> "EveryRecursion":
        """Every token takes all of them."""
        return EveryRecursion()

    def init_state(
        self, stack: Stack, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> RecursiveState:
        """Empty decode states: every recursion has its own, although they share parameters."""
        size = (batch_size, max_length, d_model, dtype)
        return self.layout(stack).init_state(stack, self.num_recursions, *size)

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
        first, recursions, last = self.layout(stack).bind(stack, self)
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


class EveryRecursion:
    """The routing of a token that takes every recursion, as `Depthwise` asks for it."""

    def begin(self, x, *, num_recursions):
        return jnp.ones(x.shape[:2], bool), ()

    def after(self, r, x, y, kept, *, num_recursions):
        return y, r + 1 < num_recursions, ()
