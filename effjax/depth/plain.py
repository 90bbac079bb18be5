"""Every token passes every block once."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from effjax.depth.stack import Stack
from effjax.registry import register


@register("depth", "plain")
class Plain(nn.Module):
    """The ordinary Transformer: all layers, in order, with parameters of their own."""

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
        layers = stack.clone(parent=self, name="layers")
        x, _, aux = layers(x, positions=positions, segment_ids=segment_ids, train=train)
        return x, aux
