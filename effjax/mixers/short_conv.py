"""The gated short convolution of BASED: the cheapest mixer, for what is a few tokens away."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.nn import Linear
from effjax.registry import register


@flax.struct.dataclass
class ConvState:
    """The last inputs of the convolution, oldest first.

    Attributes:
      inputs: [B, W - 1, E] inputs of the newest tokens; zeros where there were none yet.
      segment_ids: [B, W - 1] segment of each; 0 where there were none yet.
    """

    inputs: Float[Array, "B S E"]
    segment_ids: Int[Array, "B S"]


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
    """

    width: int = 3
    expansion: int = 2
    use_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        for field in ("width", "expansion"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; valid: a positive int")

    def init_state(
        self, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> ConvState:
        """A state that has seen nothing; its size does not depend on `max_length`."""
        slots = (batch_size, self.width - 1)
        return ConvState(
            inputs=jnp.zeros((*slots, self.expansion * d_model), dtype),
            segment_ids=jnp.zeros(slots, jnp.int32),
        )

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
        if state is None:
            mixed = _convolve(value, segment_ids, taps)
            state = self.init_state(x.shape[0], x.shape[1], d_model, x.dtype)
            _, _, state = _append(state, value, segment_ids)
        else:
            inputs, segments, state = _append(state, value, segment_ids)
            slot = jnp.where(segment_ids > 0, jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
            mixed = _convolve(inputs, segments, taps)[:, self.width - 1 :]
            mixed = jnp.take_along_axis(mixed, slot[..., None], axis=1)
        y = nn.silu(mixed) * gate
        return Linear(d_model, self.use_bias, name="out")(y), state


def _convolve(
    x: Float[Array, "B T E"], segment_ids: Int[Array, "B T"], taps: Float[Array, "W E"]
) -> Float[Array, "B T E"]:
    """y[t] = sum_j taps[W - 1 - j] x[t - j] over the j whose token is of t's segment.

    Shifted multiply-adds: for so few taps they fuse into one pass over memory, where a grouped `lax.conv` is a library
    call (on a CPU 75 times slower forward and 7 to 20 times with the backward, at 256 to 1024 tokens).
    """
    y = x * taps[-1]
    for j in range(1, min(len(taps), x.shape[1])):
        same = segment_ids[:, j:] == segment_ids[:, :-j]
        shifted = jnp.where(same[..., None], x[:, :-j], 0) * taps[-1 - j]
        y = y + jnp.pad(shifted, ((0, 0), (j, 0), (0, 0)))
    return y


def _append(
    state: ConvState, x: Float[Array, "B T E"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B S+T E"], Int[Array, "B S+T"], ConvState]:
    """The inputs in the state followed by the new ones, padding moved to the end, and the state after them."""
    num_slots = state.inputs.shape[1]
    kept = jnp.concatenate([jnp.ones_like(state.segment_ids, bool), segment_ids > 0], axis=1)
    order = jnp.argsort(~kept, axis=1, stable=True)
    inputs = jnp.concatenate([state.inputs.astype(x.dtype), x], axis=1)
    inputs = jnp.take_along_axis(inputs, order[..., None], axis=1)
    segments = jnp.concatenate([state.segment_ids, segment_ids], axis=1)
    segments = jnp.take_along_axis(segments, order, axis=1)
    newest = jnp.sum(segment_ids > 0, axis=1)[:, None] + jnp.arange(num_slots)
    state = state.replace(
        inputs=jnp.take_along_axis(inputs, newest[..., None], axis=1).astype(state.inputs.dtype),
        segment_ids=jnp.take_along_axis(segments, newest, axis=1),
    )
    return inputs, segments, state
