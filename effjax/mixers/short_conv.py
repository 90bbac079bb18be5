"""The gated short convolution of BASED: the cheapest mixer, for what is a few tokens away."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.mixers.causal_conv import ConvState, causal_conv
from effjax.nn import Linear
from effjax.registry import register


@register("mixer", "short_conv")
class ShortConv(nn.Module):
    """out(silu(conv(value(x))) * gate(x)), with a causal depthwise convolution of a few taps.

    The "BaseConv" layer of BASED: gating makes the products of neighbours that one linear attention layer cannot
    form, such as "this token follows that key" (Arora et al., 2023, arXiv 2312.04927, section 4; Arora et al., 2024,
    arXiv 2402.18668, section 4 and the authors' `convolution.py`). A tap that would reach into another segment, or
    before the beginning, reads zero. Padding may stand before and after the text of a row, not within it.

    Attributes:
      width: taps of the convolution, the token itself included.
      expansion: channels of the convolution, as a multiple of d_model.
      use_bias: biases on the three linear maps.
      conv_bias: a bias on the convolution.
    """

    width: int = 3
    expansion: int = 2
    use_bias: bool = True
    conv_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        for field in ("width", "expansion"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; valid: a positive int")

    def init_state(
        self, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> ConvState:
        """A state that has seen nothing; its size does not depend on `max_length`."""
        return ConvState.empty(batch_size, self.width, self.expansion * d_model, dtype)

    def flops_per_token(self, d_model: int, context: int) -> float:
        channels = self.expansion * d_model
        return 2.0 * channels * (3 * d_model + self.width)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: ConvState | None = None,
    ) -> tuple[Float[Array, "B T D"], ConvState]:
        d_model = x.shape[-1]
        channels = self.expansion * d_model
        value = Linear(channels, self.use_bias, name="value")(x)
        gate = Linear(channels, self.use_bias, name="gate")(x)
        # Uniform with variance 1 / (3 width), the initialiser of the source.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=1)
        taps = self.param("conv", init, (self.width, channels), jnp.float32).astype(x.dtype)
        mixed, state = causal_conv(value, segment_ids, taps, state)
        if self.conv_bias:
            zeros = nn.initializers.zeros_init()
            mixed += self.param("conv_bias", zeros, (channels,), jnp.float32).astype(x.dtype)
        y = nn.silu(mixed) * gate
        return Linear(d_model, self.use_bias, name="out")(y), state
