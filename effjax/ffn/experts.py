"""Feed-forwards side by side, one an expert, with stacked weights."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.ffn.dense import activation, gated_width


class Experts(nn.Module):
    """E feed-forwards of one shape: down(act(gate(x)) * up(x)), or down(act(up(x))) if not gated.

    Parameters: `up` and, if gated, `gate` [E, D, F]; `down` [E, F, D].

    Attributes:
      num_experts: E.
      hidden_dim: F; None means `gated_width(d_model)` if gated and 4 * d_model if not.
      gated: whether the hidden layer is multiplied by a gate.
      activation: one of `effjax.ffn.dense.ACTIVATIONS`.
      init_scale: scale of the truncated normal initialiser, whose variance is scale / fan-in.
    """

    num_experts: int
    hidden_dim: int | None = None
    gated: bool = True
    activation: str = "silu"
    init_scale: float = 1.0

    def width(self, d_model: int) -> int:
        """Hidden width of an expert."""
        return self.hidden_dim or (gated_width(d_model) if self.gated else 4 * d_model)

    def flops_per_row(self, d_model: int) -> float:
        """Forward FLOPs of one token in one expert."""
        return 2.0 * (3 if self.gated else 2) * d_model * self.width(d_model)

    @nn.compact
    def __call__(
        self,
        rows: Float[Array, "... D"],
        matmul: Callable[[Float[Array, "... D"], Float[Array, "E D F"]], Float[Array, "... F"]],
    ) -> Float[Array, "... D"]:
        """Applies to every row its expert.

        Args:
          rows: expert inputs, in any layout that `matmul` knows.
          matmul: multiplies each row by the matrix of its expert.
        """
        d_model = rows.shape[-1]
        width = self.width(d_model)
        hidden = matmul(rows, self._stack("up", d_model, width).astype(rows.dtype))
        if self.gated:
            gate = matmul(rows, self._stack("gate", d_model, width).astype(rows.dtype))
            hidden = activation(self.activation)(gate) * hidden
        else:
            hidden = activation(self.activation)(hidden)
        return matmul(hidden, self._stack("down", width, d_model).astype(rows.dtype))

    def _stack(self, name: str, fan_in: int, fan_out: int) -> Float[Array, "E I O"]:
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "truncated_normal", batch_axis=(0,)
        )
        return self.param(name, init, (self.num_experts, fan_in, fan_out), jnp.float32)
