"""Moving tokens to their experts and back: the two ways, with the same numbers unless tokens drop.

`capacity` gives every expert a buffer of fixed size in every row of the batch. It is dense matrix
multiplication whatever the router does, and what does not fit is dropped. `dropless` sorts all
tokens by expert and multiplies ragged groups; nothing is dropped, nothing is padded. In both, the
choice of a null expert takes no part in any matrix multiplication: it has no row in a buffer, and
its rows lie past the last group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.nn import constrain, on_shards
from effjax.nn.shards import num_parts
from effjax.routing.placement import Placement, by_capacity, by_expert
from effjax.routing.top_k import Assignment
from pallas_kernels import grouped_matmul

# Applies experts to rows, given how to multiply a row by the matrix of its expert.
ApplyExperts = Callable[[Float[Array, "... D"], Callable], Float[Array, "... D"]]


def capacity(
    apply_experts: ApplyExperts,
    x: Float[Array, "B T D"],
    assignment: Assignment,
    num_rows: int,
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T K"]]:
    """Experts on buffers of `num_rows` rows an expert and batch row.

    The rows of the batch are the groups of GShard (arXiv 2006.16668, section 3.2): each places its
    own tokens, so placement needs no communication where the batch is split over devices, and the
    buffers change hands by one all-to-all each way where the experts are.

    Args:
      apply_experts: the experts.
      x: tokens.
      assignment: [B, T, K] choices.
      num_rows: rows that each expert has for each row of the batch.

    Returns:
      The weighted sum of expert outputs, and which assignments were computed.
    """
    num_experts = assignment.num_experts
    placement = jax.vmap(lambda i: by_capacity(i, num_experts, num_rows))(assignment.indices)
    buffers = jax.vmap(to_rows)(x, placement).reshape(x.shape[0], num_experts, num_rows, -1)
    buffers = _hand_over(buffers, "batch _ _ _", to="expert group _ _")
    outputs = apply_experts(buffers, lambda rows, w: jnp.einsum("ebcd,edf->ebcf", rows, w))
    outputs = _hand_over(outputs, "expert group _ _", to="batch _ _ _")
    outputs = outputs.reshape(x.shape[0], num_experts * num_rows, -1)
    choices = jax.vmap(from_rows)(outputs, placement)
    return combine(choices, assignment.weights), placement.kept


def dropless(
    apply_experts: ApplyExperts, x: Float[Array, "B T D"], assignment: Assignment
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T K"]]:
    """Experts on ragged groups of rows, as in MegaBlocks (arXiv 2211.15841).

    On a mesh each device sorts the tokens that it holds, and has the matrices of all experts for them.

    Args and results as for `capacity`.
    """
    parts = [_parts("batch", x.shape[0]), _parts("length", x.shape[1])]
    placement = _each(lambda i: by_expert(i, assignment.num_experts))(
        _by_part(assignment.indices, parts)
    )
    rows = _each(to_rows)(_by_part(x, parts), placement)
    outputs = apply_experts(rows, lambda rows, w: _multiply(rows, w, placement.sizes))
    choices = _together(_each(from_rows)(outputs, placement), assignment.indices.shape)
    return combine(choices, assignment.weights), assignment.true


def _parts(axis: str, size: int) -> int:
    """Parts that a mesh splits an axis into."""
    parts = num_parts(axis)
    return 1 if size % parts else parts


def _by_part(x: Float[Array, "B T ..."], parts: list[int]) -> Float[Array, "P Q N ..."]:
    """Tokens by the part of the batch and of the rows that they are in."""
    by_batch, by_length = parts
    batch, length, *rest = x.shape
    x = x.reshape(by_batch, batch // by_batch, by_length, length // by_length, *rest)
    return jnp.swapaxes(x, 1, 2).reshape(by_batch, by_length, -1, *rest)


def _together(x: Float[Array, "P Q N ..."], shape: tuple[int, ...]) -> Float[Array, "B T ..."]:
    """The inverse, of tokens whose first axes are those of `shape`."""
    (by_batch, by_length, _, *rest), (batch, length) = x.shape, shape[:2]
    x = x.reshape(by_batch, by_length, batch // by_batch, length // by_length, *rest)
    return jnp.swapaxes(x, 1, 2).reshape(batch, length, *rest)


def _each(function: Callable) -> Callable:
    return jax.vmap(jax.vmap(function))


def _multiply(rows, matrices, sizes):
    """[P, Q, R, D] x [E, D, F] -> [P, Q, R, F]; sizes [P, Q, E]."""

    def local(rows, matrices, sizes, axis_name=None):
        del axis_name  # rows have nothing to do with each other
        return grouped_matmul(rows[0, 0], matrices, sizes[0, 0])[None, None]

    tokens = "batch length _ _"
    return on_shards(local, (tokens, "_ _ _", "batch length _"), tokens)(rows, matrices, sizes)


def combine(
    choices: Float[Array, "B T K D"], weights: Float[Array, "B T K"]
) -> Float[Array, "B T D"]:
    """Weighted sum over the choices of a token."""
    return jnp.einsum("btkd,btk->btd", choices, weights.astype(choices.dtype))


@jax.custom_vjp
def to_rows(x: Float[Array, "T D"], placement: Placement) -> Float[Array, "R D"]:
    """The token in each row; zeros in empty rows. The transpose of `from_rows`, summed over K."""
    k = placement.row.shape[-1]
    return _take(x, placement.assignment // k)


@jax.custom_vjp
def from_rows(rows: Float[Array, "R D"], placement: Placement) -> Float[Array, "T K D"]:
    """The row of each assignment; zeros for dropped ones."""
    return _take(rows, placement.row)


# Autodiff would transpose these gathers to scatters; the other half of the placement makes the
# transpose a gather as well.
to_rows.defvjp(
    lambda x, placement: (to_rows(x, placement), placement),
    lambda placement, g: (jnp.sum(_take(g, placement.row), axis=-2), None),
)
from_rows.defvjp(
    lambda rows, placement: (from_rows(rows, placement), placement),
    lambda placement, g: (_take(g.reshape(-1, g.shape[-1]), placement.assignment), None),
)


def _hand_over(buffers: Float[Array, "X Y C D"], held: str, to: str):
    """Swaps the first two axes, and on a mesh moves the buffers from one sharding to another.

    Both shardings are stated, so that the compiler finds the all-to-all in the backward pass too.
    """
    return constrain(jnp.swapaxes(constrain(buffers, held), 0, 1), to)


def _take(x: Float[Array, "N D"], index) -> Float[Array, "... D"]:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)
