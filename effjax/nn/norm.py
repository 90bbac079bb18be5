"""Normalisation over the feature axis, always in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.registry import register


@register("norm", "rms")
class RMSNorm(nn.Module):
    """y = x / rms(x) * scale (Zhang and Sennrich, 2019, arXiv 1910.07467).

    Attributes:
      epsilon: added to the mean square.
      zero_centred: y = x / rms(x) * (1 + scale), so that weight decay pulls towards no scaling, and not towards zero
        (Gemma, arXiv 2403.08295).
    """

    epsilon: float = 1e-6
    zero_centred: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        init = nn.initializers.zeros_init() if self.zero_centred else nn.initializers.ones_init()
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        if self.zero_centred:
            scale = 1.0 + scale.astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * scale).astype(x.dtype)


@register("norm", "layer")
class LayerNorm(nn.Module):
    """y = (x - mean(x)) / std(x) * scale + bias (Ba et al., 2016, arXiv 1607.06450).

    Attributes:
      epsilon: added to the variance.
      use_bias: whether there is a bias.
    """

    epsilon: float = 1e-5
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(
            jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon
        )
        y = centred * inverse
        y = y * self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        return y.astype(x.dtype)
