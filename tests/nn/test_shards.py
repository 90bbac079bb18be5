"""Functions that see one device's share."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.nn import shards
from effjax.nn.shards import constrain, on_shards

RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"), ("length", None))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)


@pytest.fixture
def warnings_so_far(caplog):
    """The log, with nothing said before: a process is told once of an axis, which other tests may have."""
    shards._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


def shapes_seen(mesh, rules, *arrays, axes):
    seen = []

    def function(*arrays):
        seen.append([x.shape for x in jax.tree.leaves(arrays)])
        return jax.tree.map(lambda x: 2 * x, arrays)

    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        out = jax.jit(on_shards(function, axes, axes))(*arrays)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(2 * x, y), arrays, out)
    return seen[-1]


def test_each_device_sees_its_rows_and_heads(mesh, rng):
    x, state = (
        rng.integers(100, size=(8, 3, 4), dtype=np.int32),
        (
            rng.integers(100, size=(4, 8), dtype=np.int32),
            rng.integers(100, size=(2, 8), dtype=np.int32),
        ),
    )
    axes = ("batch length heads", "heads _")
    assert shapes_seen(mesh, RULES, x, state, axes=axes) == [(2, 3, 2), (2, 8), (1, 8)]


def test_nothing_is_passed_on_as_nothing(mesh, rng):
    out = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        on_shards(lambda x, none: out.append(none) or x, ("batch", "batch"), "batch")(
            jnp.ones(4), None
        )
    assert out == [None]


def test_an_axis_that_does_not_divide_is_whole_for_all_and_logged(mesh, rng, warnings_so_far):
    x, y = (
        rng.integers(100, size=(4, 4), dtype=np.int32),
        rng.integers(100, size=(4, 3), dtype=np.int32),
    )
    assert shapes_seen(mesh, RULES, x, y, axes=("batch heads",) * 2) == [(1, 4), (1, 3)]
    assert "axis 'heads' of size 3 is kept whole" in warnings_so_far.text


def test_a_function_is_told_of_the_axis_that_splits_time(mesh, rng):
    x = rng.integers(100, size=(4, 8), dtype=np.int32)
    rules = (("batch", "data"), ("length", "tensor"))

    def total(x, axis_name=None):
        within = x.sum(axis=1, keepdims=True)
        return within if axis_name is None else jax.lax.psum(within, axis_name)

    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = jax.jit(on_shards(total, ("batch length",), "batch _"))(x)
    np.testing.assert_array_equal(found, x.sum(axis=1, keepdims=True))
    # 3 does not divide by 2: each device has whole rows, and nothing is said of an axis.
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = jax.jit(on_shards(total, ("batch length",), "batch _"))(x[:, :3])
    np.testing.assert_array_equal(found, x[:, :3].sum(axis=1, keepdims=True))


def test_what_is_left_of_an_axis_by_another(mesh):
    rules = (*RULES, ("embed", "fsdp"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = jax.jit(lambda x: constrain(x, "batch-embed length embed"))(jnp.ones((8, 3, 4)))
        only_rows = jax.jit(lambda x: constrain(x, "batch-embed length embed"))(jnp.ones((6, 3, 5)))
    assert found.sharding.shard_shape(found.shape) == (4, 3, 2)
    assert only_rows.sharding.shard_shape(only_rows.shape) == (3, 3, 5)


def test_constraints_split_what_divides_and_leave_the_rest_whole(mesh, warnings_so_far):
    def shares(*shape):
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            found = jax.jit(lambda x: constrain(x, "batch length heads"))(jnp.ones(shape))
        return found.sharding.shard_shape(shape)

    assert shares(8, 3, 4) == (2, 3, 2)
    assert shares(8, 3, 5) == (2, 3, 5)
    assert "axis 'heads' of size 5 is kept whole" in warnings_so_far.text
    np.testing.assert_array_equal(constrain(jnp.ones((2, 3)), "batch _"), 1)


@pytest.mark.parametrize("case", ["no rules", "one device", "manual"])
def test_called_as_it_is(mesh, rng, case):
    x = rng.integers(100, size=(8, 4), dtype=np.int32)
    if case == "manual":
        whole = on_shards(lambda x: 2 * x, ("batch heads",), "batch heads")
        spec = jax.P(("data", "fsdp"), "tensor")
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            y = jax.jit(jax.shard_map(whole, in_specs=spec, out_specs=spec))(x)
        np.testing.assert_array_equal(y, 2 * x)
        return
    if case == "one device":
        mesh = jax.make_mesh((1, 1, 1), mesh.axis_names, mesh.axis_types)
    rules = () if case == "no rules" else RULES
    assert shapes_seen(mesh, rules, x, axes=("batch heads",)) == [(8, 4)]


def test_a_sum_over_an_axis_of_one_device_is_whole(rng):
    """Also where it is traced again, as in a scan or where activations are recomputed."""
    mesh = jax.make_mesh((2, 1), ("data", "context"), (jax.sharding.AxisType.Auto,) * 2)
    x = rng.integers(100, size=(4, 6), dtype=np.int32)
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"), ("length", "context"))):
        total = on_shards(lambda x: jnp.sum(x, axis=1), ("batch length",), "batch")
        found = jax.jit(jax.checkpoint(total))(x)
    np.testing.assert_array_equal(found, x.sum(axis=1))


def test_within_a_shard_map_the_other_axes_are_split_and_differentiated(mesh, rng):
    """What the author of the outer one has split is whole to the inner one."""
    x = rng.normal(size=(4, 2)).astype(np.float32)
    seen = []

    def square(x):
        seen.append(x.shape)
        return x**2

    def outer(x):
        return on_shards(square, ("batch heads",), "batch heads")(x)

    rows = jax.P("data")
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        split = jax.shard_map(
            outer, in_specs=rows, out_specs=rows, axis_names={"data"}, check_vma=False
        )
        found = jax.jit(jax.grad(lambda x: jnp.sum(split(x))))(x)
    assert set(seen) == {(1, 1)}
    np.testing.assert_allclose(found, 2 * x, rtol=1e-6)
