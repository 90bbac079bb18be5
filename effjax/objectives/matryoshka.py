"""The Matryoshka loss: any loss of an embedding, summed over nested prefixes of it."""

import math
from collections.abc import Callable, Sequence

from jaxtyping import Array, Float

from effjax.heads.matryoshka import check_dims

Scalars = dict[str, Float[Array, ""]]


def nested(
    loss_at: Callable[[int], tuple[Float[Array, ""], Scalars]],
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
) -> tuple[Float[Array, ""], Scalars]:
    """sum over m in `dims` of c_m L(z[:m]) (Kusupati et al., 2022, arXiv 2205.13147, eq. 1).

    Args:
      loss_at: m -> (loss of the first m coordinates, its metrics).
      dims: the nested dimensions m, increasing.
      weights: the relative importances c_m; None means 1 each, as in the paper.

    Returns:
      The sum, and the metrics of each dimension under `<name>/<m>`.

    Raises:
      ValueError: if the dimensions do not nest, or the weights are not one each, finite and not
        negative.
    """
    check_dims("matryoshka_dims", dims)
    weights = (1.0,) * len(dims) if weights is None else weights
    usable = all(math.isfinite(c) and c >= 0 for c in weights) and any(weights)
    if len(weights) != len(dims) or not usable:
        raise ValueError(
            f"matryoshka_weights is {weights}; valid: {len(dims)} numbers, one for each of "
            f"the dimensions {dims}, finite, not negative and not all zero"
        )
    terms: list[Array] = []
    metrics: Scalars = {}
    for dim, weight in zip(dims, weights, strict=True):
        loss, of_dim = loss_at(dim)
        terms.append(weight * loss)
        metrics |= {f"{name}/{dim}": value for name, value in of_dim.items()}
    return sum(terms[1:], start=terms[0]), metrics
