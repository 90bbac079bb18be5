"""Mamba-2: the selective state-space model whose decay is one number a head, and which is attention in disguise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.mixers.causal_conv import ConvState, causal_conv
from effjax.mixers.mamba import MambaState, conv_params, step_bias
from effjax.mixers.recurrent_state import RecurrentState, advance
from effjax.nn import Linear, on_shards
from effjax.registry import register
from pallas_kernels import ssd_decode, ssd_scan

DECAY_RANGE = (1.0, 16.0)


@register("mixer", "mamba2")
class Mamba2(nn.Module):
    """out(norm(scan(u; Δ, A, B, C, D) * silu(gate(x)))) with u, B, C = silu(conv(linear(x))) and Δ linear in x.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_tᵀ and y_t = h_t C_t + D u_t for each head, with a state of head_dim x
    state_dim: C, B and u are the queries, keys and values of linear attention with a decay (Dao and Gu, 2024,
    arXiv 2405.21060, sections 5 to 7; initial values as in the authors' `mamba2.py`). It is mixer and feed-forward in
    one. Padding may stand before and after the text of a row, not within it.

    Attributes:
      head_dim: channels P of a head.
      state_dim: N, columns of a head's state.
      num_groups: groups G of heads that share B and C, a divisor of the heads.
      expansion: channels of all heads, as a multiple of d_model.
      width: taps of the convolution, the token itself included.
      norm_groups: parts of the channels that are normalised apart, a divisor of the heads; None means `num_groups`.
      epsilon: of the norm.
      implementation: of `pallas_kernels.ssd_scan`; None takes the best for the platform.
    """

    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    expansion: int = 2
    width: int = 4
    norm_groups: int | None = None
    epsilon: float = 1e-5
    implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for field in ("head_dim", "state_dim", "num_groups", "expansion", "width", "norm_groups"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; valid: a positive int")

    def dims(self, d_model: int) -> tuple[int, int]:
        """(heads, channels of the convolution) at this model width.

        Raises:
          ValueError: if the heads do not divide the channels, or the groups the heads.
        """
        channels = self.expansion * d_model
        heads = channels // self.head_dim
        groups = (self.num_groups, self.norm_groups or self.num_groups)
        if channels % self.head_dim or any(heads % count for count in groups):
            raise ValueError(
                f"head_dim={self.head_dim}, num_groups={self.num_groups}, norm_groups={self.norm_groups}; valid: "
                f"head_dim divides the {channels} channels into heads, and the groups divide those heads"
            )
        return heads, channels + 2 * self.num_groups * self.state_dim

    def init_state(
        self, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> MambaState:
        """A state that has seen nothing; its size does not depend on `max_length`."""
        heads, conv_channels = self.dims(d_model)
        shape = (batch_size, heads, self.head_dim, self.state_dim)
        memory = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        return MambaState(
            ConvState.empty(batch_size, self.width, conv_channels, dtype), RecurrentState.of(memory)
        )

    def flops_per_token(self, d_model: int, context: int) -> float:
        """FLOPs of the recurrent form, which are the same at any `context`."""
        heads, conv_channels = self.dims(d_model)
        channels = heads * self.head_dim
        projections = d_model * (2 * channels + conv_channels + heads)
        return 2.0 * (projections + self.width * conv_channels + 3 * channels * self.state_dim)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: MambaState | None = None,
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        d_model = x.shape[-1]
        heads, _ = self.dims(d_model)
        channels = heads * self.head_dim
        gate = Linear(channels, name="gate")(x)
        u, b, c, conv = self._convolved(x, segment_ids, None if state is None else state.conv)
        step = Linear(heads, name="step")(x).astype(jnp.float32)
        step = jax.nn.softplus(step + step_bias(self, heads))
        log_decay = self.param("A_log", _log_uniform_decay, (heads,), jnp.float32)
        decay = -jnp.exp(log_decay.astype(jnp.float32))
        skip = self.param("D", nn.initializers.ones_init(), (heads,), jnp.float32)
        arguments = (u, step, decay, b, c, skip)
        y, scan = advance(
            None if state is None else state.scan,
            segment_ids,
            step=lambda memory: ssd_decode(memory, *arguments),
            scan=lambda memory: self._scan(arguments, segment_ids, memory),
        )
        y = self._norm(y.reshape(*x.shape[:2], channels) * nn.silu(gate))
        return Linear(d_model, name="out")(y), MambaState(conv, scan)

    def _scan(self, arguments, segment_ids, before):
        def scan(arguments, segment_ids, before, axis_name=None):
            return ssd_scan(
                *arguments,
                segment_ids=segment_ids,
                initial_state=before,
                return_state=True,
                axis_name=axis_name,
                implementation=self.implementation,
            )

        heads, memory = "batch length heads _", "batch heads _ _"
        # One group serves the heads of every device; several are split as the heads are.
        groups = "batch length _ _" if self.num_groups == 1 else heads
        axes = (heads, "batch length heads", "heads", groups, groups, "heads")
        scan = on_shards(scan, (axes, "batch length", memory), (heads, memory))
        return scan(arguments, segment_ids, before)

    def _convolved(self, x, segment_ids, conv_before):
        """u [B, T, H, P], B and C [B, T, G, N], and the state of the convolution over the three side by side."""
        heads, conv_channels = self.dims(x.shape[-1])
        sizes = (heads * self.head_dim, *2 * (self.num_groups * self.state_dim,))
        parts = [
            Linear(size, name=name)(x)
            for name, size in zip(("value", "B", "C"), sizes, strict=True)
        ]
        taps, bias = conv_params(self, self.width, conv_channels)
        joined = jnp.concatenate(parts, axis=-1)
        joined, conv = causal_conv(joined, segment_ids, taps.astype(x.dtype), conv_before)
        joined = nn.silu(joined + bias.astype(x.dtype))
        u, b, c = jnp.split(joined, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        per_group = (*x.shape[:2], self.num_groups, self.state_dim)
        u = u.reshape(*x.shape[:2], heads, self.head_dim)
        return u, b.reshape(per_group), c.reshape(per_group), conv

    def _norm(self, y):
        """RMSNorm within each group of heads, so that groups may live on different devices."""
        scale = self.param("norm_scale", nn.initializers.ones_init(), y.shape[-1:], jnp.float32)
        count = self.norm_groups or self.num_groups
        groups = y.astype(jnp.float32).reshape(*y.shape[:2], count, -1)
        mean_square = jnp.mean(jnp.square(groups), axis=-1, keepdims=True)
        normed = groups * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed.reshape(y.shape) * scale).astype(y.dtype)


def _log_uniform_decay(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, *DECAY_RANGE))
