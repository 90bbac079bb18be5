import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.nn import Linear
from effjax.nn.linear import lookup


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear_is_x_w_plus_b(rng, use_bias):
    x, kernel, bias = rng.normal(size=(2, 3, 5)), rng.normal(size=(5, 7)), rng.normal(size=7)
    params = {"kernel": jnp.float32(kernel)} | ({"bias": jnp.float32(bias)} if use_bias else {})
    layer = Linear(7, use_bias=use_bias)
    shapes = jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.float32(x))["params"])
    assert shapes == jax.tree.map(jnp.shape, params)
    y = layer.apply({"params": params}, jnp.float32(x))
    np.testing.assert_allclose(y, x @ kernel + bias * use_bias, rtol=1e-5, atol=1e-5)


def test_linear_computes_in_the_dtype_of_x_from_float32_parameters():
    y, variables = Linear(4, use_bias=True).init_with_output(
        jax.random.key(0), jnp.ones((2, 3), jnp.bfloat16)
    )
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_linear_and_its_gradients_are_products_of_two_matrices_where_no_mesh_splits_them():
    layer, x = Linear(4), jnp.ones((2, 3, 5))
    variables = layer.init(jax.random.key(0), x)

    def ranks():
        loss = lambda variables, x: jnp.sum(jnp.sin(layer.apply(variables, x)))  # noqa: E731
        equations = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables, x).eqns
        dots = [e for e in equations if e.primitive.name == "dot_general"]
        return [operand.aval.ndim for dot in dots for operand in dot.invars]

    assert ranks() == [2] * 6
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"),)):
        assert 3 in ranks()


def test_linear_starts_with_unit_gain(rng):
    x = rng.normal(size=(64, 512)).astype(np.float32)
    y, _ = Linear(512).init_with_output(jax.random.key(int(rng.integers(2**31))), x)
    assert 0.9 < np.std(y) < 1.1


def test_embedding_rows_by_token(rng):
    tokens, table = rng.integers(11, size=(2, 5)), jnp.asarray(rng.normal(size=(11, 3)), "float32")
    x = lookup(table, jnp.asarray(tokens), "bfloat16")
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, np.asarray(table.astype(jnp.bfloat16))[tokens])


@pytest.mark.parametrize("vocab_over", [None, "tensor"])
def test_a_mesh_looks_up_columns_where_they_are_and_sums_no_gradient_of_the_whole_table(
    rng, vocab_over
):
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, (jax.sharding.AxisType.Auto,) * 3)
    rules = (("batch", ("data", "fsdp")), ("embed", "fsdp"), ("vocab", vocab_over))
    table = jnp.asarray(rng.normal(size=(1000, 64)), "float32")
    tokens = jnp.asarray(rng.integers(1000, size=(64, 64)))
    weights = jnp.asarray(rng.normal(size=(64, 64, 64)), "float32")

    def loss(table, tokens, weights):
        return jnp.sum(lookup(table, tokens, "float32") * weights)

    of_table = NamedSharding(mesh, PartitionSpec(vocab_over, "fsdp"))
    of_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    places = (of_table, of_rows, of_rows)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=places, out_shardings=(None, of_table))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        compiled = step.lower(table, tokens, weights).compile()
    found = compiled(*jax.device_put((table, tokens, weights), places))
    expected = jax.value_and_grad(loss)(table, tokens, weights)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
    shapes = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    }
    rows, columns = of_table.shard_shape(table.shape)
    assert max(math.prod(shape) for shape in shapes if {rows, 1000} & set(shape)) == rows * columns
