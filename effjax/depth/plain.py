"""Every token passes every block once."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from effjax.depth.stack import Stack
from effjax.registry import register


@register("depth", "plain")
class Plain(nn.Module):
    """The ordinary Transformer: all layers, in order, with parameters of their own."""

    def repeated(self, stack: Stack) -> tuple[Stack, ...]:
        """The stacks that the stages of a pipeline hold the repeats of: that of all layers."""
        return (stack,)

    def init_state(
        self, stack: Stack, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> tuple:
        """Empty decode states, one a layer."""
        return stack.init_state(batch_size, max_length, d_model, dtype)

    @nn.compact
    def __call__(
        self,
        stack: Stack,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: Any = None,
        train: bool = False,
    ):
        """Returns (x [B, T, D], the new decode state or None if none was given, aux)."""
        layers = stack.clone(parent=self, name="layers")
        x, new_state, aux = layers(
            x, positions=positions, segment_ids=segment_ids, states=state, train=train
        )
        return x, None if state is None else new_state, aux
