"""Feature maps φ of linear attention: the weight of a key for a query is φ(q) · φ(k).

A map says two things: how to expand a vector (what the recurrent state is made of), and how to get φ(q) · φ(k) for
many pairs without expanding anything (what the inside of a chunk is made of).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """A feature map.

    Attributes:
        expand: [..., D, T] -> [..., F, T]; features lead time, so that each is a contiguous row.
        similarity: (x [..., s, D], y [..., t, D]) -> φ(x) · φ(y) [..., s, t], in at least float32.
        num_features: D -> F.
    """

    expand: Callable[[jax.Array], jax.Array]
    similarity: Callable[[jax.Array, jax.Array], jax.Array]
    num_features: Callable[[int], int]


def _inner(x, y):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...sd,...td->...st", x, y, preferred_element_type=dtype)


def _elementwise(function) -> FeatureMap:
    return FeatureMap(
        expand=function,
        similarity=lambda x, y: _inner(function(x), function(y)),
        num_features=lambda dim: dim,
    )


def _taylor_expand(x):
    """1, x / d^(1/4), and x_i x_j / sqrt(d) for the unordered pairs, the squares among them over sqrt(2).

    A pair with i != j stands for both of its orders, each x_i x_j / sqrt(2 d) in the paper: the same inner products at
    half the width. Pairs are taken by their distance on a ring of d, so that each group is one product of two slices.
    """
    dim = x.shape[-2]
    ring = jnp.concatenate([x, x], axis=-2)
    pairs = [jnp.square(x) * math.sqrt(1 / (2 * dim))]
    for distance in range(1, dim // 2 + 1):
        # At distance d / 2 the second half of the ring repeats the first.
        count = dim // 2 if 2 * distance == dim else dim
        other = ring[..., distance : distance + count, :]
        pairs.append(x[..., :count, :] * other * math.sqrt(1 / dim))
    return jnp.concatenate([jnp.ones_like(x[..., :1, :]), x * dim**-0.25, *pairs], axis=-2)


def _taylor_similarity(x, y):
    logits = _inner(x, y) * x.shape[-1] ** -0.5
    return 1 + logits + 0.5 * jnp.square(logits)


FEATURE_MAPS = {
    # Second-order Taylor series of exp(q · k / sqrt(d)): Arora et al., "Simple linear attention language models
    # balance the recall-throughput tradeoff", arXiv 2402.18668, section 4.1.
    "taylor": FeatureMap(
        expand=_taylor_expand,
        similarity=_taylor_similarity,
        num_features=lambda dim: 1 + dim + dim * (dim + 1) // 2,
    ),
    "identity": _elementwise(lambda x: x),
    # Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236, equation 7.
    "elu+1": _elementwise(lambda x: jax.nn.elu(x) + 1),
    "softplus": _elementwise(jax.nn.softplus),
}


def get(feature_map: str | FeatureMap) -> FeatureMap:
    """Looks a feature map up by name. Raises ValueError with the known names."""
    if isinstance(feature_map, FeatureMap):
        return feature_map
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"linear_attention: feature_map must be a FeatureMap or one of {sorted(FEATURE_MAPS)}, "
            f"not {feature_map!r}"
        )
    return FEATURE_MAPS[feature_map]
