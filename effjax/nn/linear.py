"""The one linear layer and the one look-up in a table of the house.

Adapters, quantisers and pruners reach every weight matrix through `Linear`, so no part multiplies by a matrix of its
own except where the weights are stacked by expert.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.nn.shards import constrain, is_split, num_parts

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
        y = product(x, self.matrix(x.shape[-1]).astype(x.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)
        return y

    @nn.compact
    def matrix(self, in_features: int) -> Float[Array, "in out"]:
        """W alone, for what is more than a product."""
        return self.param("kernel", self.kernel_init, (in_features, self.features), jnp.float32)


def product(x: Float[Array, "... in"], matrix: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """x W, as a product of two matrices where no mesh splits the rows of x.

    So is the gradient of W then. Of more axes XLA makes a transposed copy of x first, which takes a CPU longer than the
    product. Where they are split they stay apart: the compiler could not split what two of them become together.
    """
    if x.ndim < 3 or is_split():
        return x @ matrix
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """Rows of the table for each token, in `dtype`.

    Where a mesh splits rows of the batch and columns of the table over the same devices, each looks up its columns for
    the tokens of all of them, and they exchange what they found. Left to itself the compiler may rather gather the
    table in each, and sum gradients of its size.
    """
    parts = num_parts("embed")
    if parts == 1 or table.shape[1] % parts:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    tokens = constrain(tokens, "batch-embed length")
    found = jnp.take(table, tokens, axis=0).astype(dtype)
    return constrain(constrain(found, "batch-embed length embed"), "batch length _")
