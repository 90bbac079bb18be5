"""Placement against a queue an expert, filled one assignment after the other."""

import jax
import numpy as np
import pytest

from effjax.routing import placement


def choices(rng, num_tokens, k, num_experts):
    """k distinct experts a token."""
    every = np.broadcast_to(np.arange(num_experts), (num_tokens, num_experts))
    return rng.permuted(every, axis=-1)[:, :k].astype(np.int32)


@pytest.mark.parametrize("capacity", [1, 3, 20])
@pytest.mark.parametrize(("k", "num_null"), [(1, 0), (2, 0), (3, 4)])
def test_by_capacity(rng, capacity, k, num_null):
    num_experts, num_tokens = 5, 20
    indices = choices(rng, num_tokens, k, num_experts + num_null)
    queues = [[] for _ in range(num_experts)]
    row = np.full((num_tokens, k), num_experts * capacity)
    for t in range(num_tokens):
        for j, e in enumerate(indices[t]):
            if e < num_experts and len(queues[e]) < capacity:
                row[t, j] = e * capacity + len(queues[e])
                queues[e].append(t * k + j)
    assignment = [q + [num_tokens * k] * (capacity - len(q)) for q in queues]

    actual = jax.jit(placement.by_capacity, static_argnums=(1, 2))(indices, num_experts, capacity)
    np.testing.assert_array_equal(actual.row, row)
    np.testing.assert_array_equal(actual.assignment, np.concatenate(assignment))
    np.testing.assert_array_equal(actual.sizes, [len(q) for q in queues])
    np.testing.assert_array_equal(actual.kept, row < num_experts * capacity)


@pytest.mark.parametrize(("k", "num_null"), [(1, 0), (2, 0), (3, 4), (2, 30)])
def test_by_expert(rng, k, num_null):
    num_experts, num_tokens = 5, 20
    indices = choices(rng, num_tokens, k, num_experts + num_null)
    queues = [[] for _ in range(num_experts + num_null)]
    for t in range(num_tokens):
        for j, e in enumerate(indices[t]):
            queues[e].append(t * k + j)
    order = np.concatenate(queues).astype(int)

    actual = jax.jit(placement.by_expert, static_argnums=1)(indices, num_experts)
    np.testing.assert_array_equal(actual.assignment, order)
    np.testing.assert_array_equal(actual.row.reshape(-1)[order], np.arange(num_tokens * k))
    np.testing.assert_array_equal(actual.sizes, [len(q) for q in queues[:num_experts]])


def test_nothing_but_null_experts(rng):
    indices = choices(rng, 6, 2, 4) + 3
    by_capacity = placement.by_capacity(indices, 3, 2)
    assert not by_capacity.kept.any()
    assert (by_capacity.assignment == indices.size).all()
    assert placement.by_expert(indices, 3).sizes.sum() == 0


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((256, 1, 8, 1.0), 32),
        ((256, 1, 8, 1.25), 40),
        ((256, 2 * 8 / 16, 8, 1.25), 40),  # AdaMoE: half of two choices are null
        ((10, 1, 4, 1.0), 3),
        ((10, 3, 30, 1.1), 2),  # 1.1 exactly is 1.1000000000000001
        ((1, 2, 64, 1.0), 1),
        ((16, 4, 8, 100.0), 16),  # a token takes an expert once
    ],
)
def test_capacity(arguments, rows):
    assert placement.capacity(*arguments) == rows
