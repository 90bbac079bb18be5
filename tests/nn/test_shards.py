"""Functions that see one device's share."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.nn.shards import on_shards

RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"), ("length", None))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)


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


def test_an_axis_that_does_not_divide_is_whole_for_all_and_logged(mesh, rng, caplog):
    x, y = (
        rng.integers(100, size=(4, 4), dtype=np.int32),
        rng.integers(100, size=(4, 3), dtype=np.int32),
    )
    with caplog.at_level(logging.WARNING):
        assert shapes_seen(mesh, RULES, x, y, axes=("batch heads",) * 2) == [(1, 4), (1, 3)]
    assert "axis 'heads' of size 3 is kept whole" in caplog.text


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
