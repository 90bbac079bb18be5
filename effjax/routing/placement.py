"""Where each assignment of a token to an expert is computed: the rows of the experts' input.

The T * K assignments of a group of T tokens are numbered in token order: assignment t * K + j is
the j-th choice of token t. Expert inputs are rows: in `by_capacity` every expert owns the same
number of rows, in `by_expert` as many as it was assigned. A placement is the map between the two,
in both directions, so that data moves by gathers only, forward and backward: adding scatters are
slow on accelerators, and on GPUs not even deterministic.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Placement(NamedTuple):
    """A one-to-one map between some of the assignments and some of the rows.

    Attributes:
      row: [T, K], the row of each assignment; R if it has none (dropped).
      assignment: [R], the assignment in each row; T * K if the row is empty.
      sizes: [E], the number of rows in use by each expert.
    """

    row: Int[Array, "T K"]
    assignment: Int[Array, "R"]
    sizes: Int[Array, "E"]

    @property
    def kept(self) -> Bool[Array, "T K"]:
        """Which assignments have a row."""
        return self.row < self.assignment.shape[-1]


def capacity(num_tokens: int, per_token: float, num_experts: int, factor: float) -> int:
    """Rows that an expert gets: the even share of the assignments, times a factor, rounded up.

    This is Switch Transformer's tokens / experts * capacity factor (arXiv 2101.03961, eq. 3) for
    `per_token` assignments a token; it is at least 1, and at most the number of tokens, since no
    token takes an expert twice.
    """
    share = num_tokens * per_token / num_experts
    return min(num_tokens, max(1, math.ceil(round(share * factor, 6))))


def by_capacity(indices: Int[Array, "T K"], num_experts: int, capacity: int) -> Placement:
    """Expert e owns the rows e * capacity ... (e + 1) * capacity - 1 of R = num_experts * capacity.

    Earlier tokens go first, and within a token the better choice: what comes to a full expert is
    dropped, so no token can push out an earlier one and causal models stay causal. Indices from
    `num_experts` on (null experts) have no rows.
    """
    order, rank, sizes = _sort(indices, num_experts)
    start = jnp.cumsum(sizes) - sizes
    expert = jnp.minimum(indices, num_experts - 1)
    place = rank - start[expert]
    kept = (indices < num_experts) & (place < capacity)
    row = jnp.where(kept, expert * capacity + place, num_experts * capacity)

    slots = jnp.arange(capacity)
    source = jnp.minimum(start[:, None] + slots, indices.size - 1)
    used = slots < sizes[:, None]
    assignment = jnp.where(used, order[source], indices.size).reshape(-1)
    return Placement(row, assignment, jnp.minimum(sizes, capacity))


def by_expert(indices: Int[Array, "T K"], num_experts: int) -> Placement:
    """One row for every assignment, R = T * K, sorted by expert and by token within an expert.

    The assignments to null experts, indices from `num_experts` on, are the last rows and belong to
    no expert: `sizes` does not count them.
    """
    order, rank, sizes = _sort(indices, num_experts)
    return Placement(rank, order, sizes)


def _sort(indices: Int[Array, "T K"], num_experts: int):
    """Assignments sorted by expert [T * K], rank of each [T, K], load of each expert [E]."""
    order = jnp.argsort(indices.reshape(-1), stable=True)
    rank = jnp.argsort(order).reshape(indices.shape)
    sizes = jnp.sum(jax.nn.one_hot(indices, num_experts, dtype=jnp.int32), axis=(0, 1))
    return order, rank, sizes
