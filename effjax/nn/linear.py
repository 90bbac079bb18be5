"""The one linear layer and the one embedding table of the house.

Adapters, quantisers and pruners reach every weight matrix through `Linear`, so no part multiplies by a matrix of its
own except where the weights are stacked by expert.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Unit variance of the output for unit variance of the input (LeCun et al., 1998).
default_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Linear(nn.Module):
    """y = x W (+ b), computed in the dtype of x from float32 parameters.

    Attributes:
      features: size of the last axis of the result.
      use_bias: whether to add a bias, initialised to zero.
      kernel_init: initializer of `kernel` [in, features].
    """

    features: int
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)
        return y


class Embed(nn.Module):
    """Table of `num_embeddings` float32 vectors; `__call__` returns the table, for a tied head to share.

    Attributes:
      num_embeddings: rows of the table.
      features: columns of the table.
      stddev: standard deviation of the normal initialiser.
    """

    num_embeddings: int
    features: int
    stddev: float = 0.02

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        init = nn.initializers.normal(self.stddev)
        return self.param("embedding", init, (self.num_embeddings, self.features), jnp.float32)


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """Rows of the table for each token, in `dtype`."""
    return jnp.take(table, tokens, axis=0).astype(dtype)
