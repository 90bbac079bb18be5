"""The causal depthwise convolution of a few taps, and what it remembers: part of ShortConv, Mamba and Mamba-2."""

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class ConvState:
    """The last inputs of the convolution, oldest first.

    Attributes:
      inputs: [B, W - 1, E] inputs of the newest tokens; zeros where there were none yet.
      segment_ids: [B, W - 1] segment of each; 0 where there were none yet.
    """

    inputs: Float[Array, "B S E"]
    segment_ids: Int[Array, "B S"]

    @classmethod
    def empty(cls, batch_size: int, width: int, num_channels: int, dtype) -> "ConvState":
        slots = (batch_size, width - 1)
        return cls(jnp.zeros((*slots, num_channels), dtype), jnp.zeros(slots, jnp.int32))


def causal_conv(
    x: Float[Array, "B T E"],
    segment_ids: Int[Array, "B T"],
    taps: Float[Array, "W E"],
    state: ConvState | None = None,
) -> tuple[Float[Array, "B T E"], ConvState]:
    """y[t] = sum_j taps[W - 1 - j] x[t - j] over the j whose token is of t's segment.

    Args:
      x: inputs.
      segment_ids: a tap that would reach into another segment, or before the beginning, reads zero.
      taps: weights, the token's own last.
      state: what was remembered before x; None: nothing. Without one, padding may stand before and after the text of a
        row, not within it.

    Returns:
      y, and the state after x.
    """
    if state is None:
        state = ConvState.empty(x.shape[0], len(taps), x.shape[-1], x.dtype)
        _, _, state = _append(state, x, segment_ids)
        return _convolve(x, segment_ids, taps), state
    inputs, segments, state = _append(state, x, segment_ids)
    slot = jnp.where(segment_ids > 0, jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
    y = _convolve(inputs, segments, taps)[:, len(taps) - 1 :]
    return jnp.take_along_axis(y, slot[..., None], axis=1), state


def _convolve(
    x: Float[Array, "B T E"], segment_ids: Int[Array, "B T"], taps: Float[Array, "W E"]
) -> Float[Array, "B T E"]:
    """The convolution of `causal_conv` without a state.

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
    state = dataclasses.replace(
        state,
        inputs=jnp.take_along_axis(inputs, newest[..., None], axis=1).astype(state.inputs.dtype),
        segment_ids=jnp.take_along_axis(segments, newest, axis=1),
    )
    return inputs, segments, state
