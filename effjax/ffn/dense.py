"""Feed-forwards that every token passes whole."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from effjax.nn import Linear, scalars
from effjax.registry import register, unknown


def gelu_exact(x):
    """x Φ(x) (Hendrycks and Gimpel, 2016, arXiv 1606.08415), by erf, a rational function: `nn.gelu` takes erfc, which
    is more precise where it is next to nothing, and two exponentials and twice the time on a CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * (0.5**0.5)))


ACTIVATIONS = {
    "gelu": nn.gelu,
    "gelu_exact": gelu_exact,
    "relu": nn.relu,
    "relu2": lambda x: jax.numpy.square(nn.relu(x)),
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
}


def activation(name: str):
    """The elementwise nonlinearity of that name."""
    if name not in ACTIVATIONS:
        raise ValueError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


def gated_width(d_model: int, multiple_of: int = 32) -> int:
    """Hidden width that gives a gated feed-forward the parameters of a 4x dense one: 8/3 d_model, rounded up."""
    return -(-8 * d_model // (3 * multiple_of)) * multiple_of


@register("ffn", "dense")
class Dense(nn.Module):
    """down(act(up(x))), the Transformer's feed-forward (Vaswani et al., 2017, eq. 2).

    Attributes:
      hidden_dim: width of the hidden layer; None means 4 * d_model.
      activation: one of `ACTIVATIONS`.
      use_bias: biases on both linear maps.
    """

    hidden_dim: int | None = None
    activation: str = "gelu"
    use_bias: bool = False

    def flops_per_token(self, d_model: int) -> float:
        return 2.0 * 2 * d_model * (self.hidden_dim or 4 * d_model)

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, mask=None, train: bool = False):
        d_model = x.shape[-1]
        hidden = Linear(self.hidden_dim or 4 * d_model, self.use_bias, name="up")(x)
        y = Linear(d_model, self.use_bias, name="down")(activation(self.activation)(hidden))
        return y, scalars.flops(self.flops_per_token(d_model))


@register("ffn", "gated")
class Gated(nn.Module):
    """down(act(gate(x)) * up(x)); SwiGLU with `silu`, GLU with `sigmoid` (Shazeer, 2020, arXiv 2002.05202, eq. 6).

    Attributes:
      hidden_dim: width of the hidden layer; None means `gated_width(d_model)`.
      activation: one of `ACTIVATIONS`.
      use_bias: biases on all three linear maps.
    """

    hidden_dim: int | None = None
    activation: str = "silu"
    use_bias: bool = False

    def flops_per_token(self, d_model: int) -> float:
        return 2.0 * 3 * d_model * (self.hidden_dim or gated_width(d_model))

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, mask=None, train: bool = False):
        d_model = x.shape[-1]
        width = self.hidden_dim or gated_width(d_model)
        gate = Linear(width, self.use_bias, name="gate")(x)
        up = Linear(width, self.use_bias, name="up")(x)
        y = Linear(d_model, self.use_bias, name="down")(activation(self.activation)(gate) * up)
        return y, scalars.flops(self.flops_per_token(d_model))
