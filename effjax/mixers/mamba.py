"""Mamba: a state-space model whose step, input and output depend on the token."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.mixers.causal_conv import ConvState, causal_conv
from effjax.mixers.recurrent_state import RecurrentState, advance
from effjax.nn import Linear, on_shards
from effjax.registry import register
from pallas_kernels import selective_scan, selective_scan_decode

STEP_RANGE = (1e-3, 0.1)


@flax.struct.dataclass
class MambaState:
    """What Mamba and Mamba-2 remember.

    Attributes:
      conv: the last inputs of the convolution.
      scan: the state of the scan, at least float32.
    """

    conv: ConvState
    scan: RecurrentState


@register("mixer", "mamba")
class Mamba(nn.Module):
    """out(scan(u; Δ, A, B, C, D) * silu(gate(x))) with u = silu(conv(value(x))) and Δ, B, C linear in u.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t h_t + D u_t for each of E = expansion * d_model channels, each
    with `state_dim` numbers of state (Gu and Dao, 2023, arXiv 2312.00752, algorithm 2 and section 3.4; initial values
    as in section 3.6 and the authors' `mamba_simple.py`). It is mixer and feed-forward in one: the paper's stack has
    no other. Padding may stand before and after the text of a row, not within it.

    Attributes:
      state_dim: numbers N of state a channel.
      expansion: channels, as a multiple of d_model.
      width: taps of the convolution, the token itself included.
      step_rank: rank R of the map to the step Δ; None means d_model / 16, rounded up.
      implementation: of `pallas_kernels.selective_scan`; None takes the best for the platform.
    """

    state_dim: int = 16
    expansion: int = 2
    width: int = 4
    step_rank: int | None = None
    implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for field in ("state_dim", "expansion", "width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; valid: a positive int")

    def dims(self, d_model: int) -> tuple[int, int]:
        """(channels, rank of the step) at this model width."""
        return self.expansion * d_model, self.step_rank or -(-d_model // 16)

    def init_state(
        self, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> MambaState:
        """A state that has seen nothing; its size does not depend on `max_length`."""
        channels, _ = self.dims(d_model)
        memory = jnp.zeros(
            (batch_size, channels, self.state_dim), jnp.promote_types(dtype, jnp.float32)
        )
        return MambaState(
            ConvState.empty(batch_size, self.width, channels, dtype), RecurrentState.of(memory)
        )

    def flops_per_token(self, d_model: int, context: int) -> float:
        """FLOPs of the recurrent form, which are the same at any `context`."""
        channels, rank = self.dims(d_model)
        projections = 3 * d_model + 2 * rank + 2 * self.state_dim + self.width
        return 2.0 * channels * (projections + 3 * self.state_dim)

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
        channels, _ = self.dims(d_model)
        u = Linear(channels, name="value")(x)
        gate = Linear(channels, name="gate")(x)
        taps, bias = conv_params(self, self.width, channels)
        conv_before = None if state is None else state.conv
        u, conv = causal_conv(u, segment_ids, taps.astype(x.dtype), conv_before)
        u = nn.silu(u + bias.astype(x.dtype))
        arguments = (u, *self._selection(u, d_model), gate)
        y, scan = advance(
            None if state is None else state.scan,
            segment_ids,
            step=lambda memory: selective_scan_decode(memory, *arguments),
            scan=lambda memory: self._scan(arguments, segment_ids, memory),
        )
        return Linear(d_model, name="out")(y), MambaState(conv, scan)

    def _scan(self, arguments, segment_ids, before):
        def scan(arguments, segment_ids, before, axis_name=None):
            return selective_scan(
                *arguments,
                segment_ids=segment_ids,
                initial_state=before,
                return_state=True,
                axis_name=axis_name,
                implementation=self.implementation,
            )

        channels, states, memory = "batch length mlp", "batch length _", "batch mlp _"
        axes = (channels, channels, "mlp _", states, states, "mlp", channels)
        scan = on_shards(scan, (axes, "batch length", memory), (channels, memory))
        return scan(arguments, segment_ids, before)

    def _selection(self, u, d_model):
        """Δ [B, T, E], A [E, N], B and C [B, T, N], D [E]; Δ and A in float32."""
        channels, rank = self.dims(d_model)
        low = Linear(rank, name="step_down")(u)
        scale = rank**-0.5
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -scale, scale)  # noqa: E731
        step = Linear(channels, kernel_init=uniform, name="step_up")(low).astype(jnp.float32)
        step = jax.nn.softplus(step + step_bias(self, channels))
        log_a = self.param("A_log", _log_of_1_to_n, (channels, self.state_dim), jnp.float32)
        skip = self.param("D", nn.initializers.ones_init(), (channels,), jnp.float32)
        b, c = (Linear(self.state_dim, name=name)(u) for name in ("B", "C"))
        return step, -jnp.exp(log_a.astype(jnp.float32)), b, c, skip


def conv_params(module: nn.Module, width: int, channels: int):
    """Taps [W, E] and bias [E] of a convolution, uniform within ± 1/sqrt(W) as torch initialises them."""
    bound = width**-0.5

    def uniform(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    taps = module.param("conv", uniform, (width, channels), jnp.float32)
    return taps, module.param("conv_bias", uniform, (channels,), jnp.float32)


def step_bias(module: nn.Module, size: int):
    """The bias of Δ = softplus(... + bias), such that softplus(bias) is log-uniform in `STEP_RANGE`."""
    low, high = map(math.log, STEP_RANGE)

    def init(key, shape, dtype):
        step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
        return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus

    return module.param("step_bias", init, (size,), jnp.float32)


def _log_of_1_to_n(key, shape, dtype):
    """The real part of S4D's spectrum (Gu et al., 2022, arXiv 2206.11893): A_n = -n."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
