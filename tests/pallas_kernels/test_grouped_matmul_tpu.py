"""grouped_matmul by `jax.lax.ragged_dot`, as TPUs run it: its values here, its kernels compiled for absent chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from proof import CHIPS, assert_close, compile_with_gradients, needs_libtpu, relative_error

from pallas_kernels import grouped_matmul, topology
from pallas_kernels.grouped_matmul import reference, tpu

FUNCTIONS = {"tpu": tpu.grouped_matmul, "reference": reference.grouped_matmul}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group_sizes", [[20, 0, 9, 8], [0, 0, 40, 0], [0, 0, 0, 0]])
def test_values_and_every_gradient_equal_float64(rng, group_sizes, dtype):
    inputs = {"lhs": rng.normal(size=(40, 9)), "rhs": rng.normal(size=(4, 9, 11))}
    sizes = jnp.asarray(group_sizes, jnp.int32)

    def make_function(implementation):
        return lambda lhs, rhs: {"out": FUNCTIONS[implementation](lhs, rhs, sizes)}

    assert_close(make_function, inputs, {"out": rng.normal(size=(40, 11))}, dtype, "tpu")


def test_rows_of_no_group_are_nowhere(rng):
    lhs = jnp.asarray(rng.normal(size=(50, 4)), jnp.float32).at[20:].set(jnp.nan)
    rhs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    out, pull = jax.vjp(lambda *x: tpu.grouped_matmul(*x, jnp.array([5, 0, 15])), lhs, rhs)
    d_lhs, d_rhs = pull(jnp.ones_like(out))
    assert np.all(out[20:] == 0) and np.all(d_lhs[20:] == 0) and np.all(d_rhs[1] == 0)
    assert np.isfinite(out).all() and np.isfinite(d_lhs).all() and np.isfinite(d_rhs).all()


def test_under_shard_map_and_remat_with_matrices_shared_by_all_devices(rng):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    lhs = jnp.asarray(rng.normal(size=(8, 10, 4)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    sizes = jnp.asarray(rng.multinomial(9, [1 / 3] * 3, size=8), jnp.int32)
    rows = PartitionSpec("data")

    def by_device(lhs, rhs, sizes):
        return jax.remat(tpu.grouped_matmul)(lhs[0], rhs, sizes[0])[None]

    sharded = jax.shard_map(
        by_device, mesh=mesh, in_specs=(rows, PartitionSpec(), rows), out_specs=rows
    )
    whole = jax.vmap(reference.grouped_matmul, in_axes=(0, None, 0))

    def gradients(function):
        def total(lhs, rhs):
            return jnp.sum(jnp.sin(function(lhs, rhs, sizes)))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(lhs, rhs)

    for got, want in zip(gradients(sharded), gradients(whole), strict=True):
        assert relative_error(got, want) < 1e-5


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("num_rows", "k", "n", "dtype"),
    [(4096, 1024, 4096, "bfloat16"), (4096, 512, 1024, "float32"), (1000, 384, 200, "bfloat16")],
)
def test_compiles_to_grouped_kernels_on_tpu(chip, num_rows, k, n, dtype):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    inputs = {"lhs": shape((num_rows, k)), "rhs": shape((8, k, n))}

    def function(lhs, rhs):
        # A value of the program, so that no compiler counts on it.
        sizes = jnp.full(8, num_rows // 9) + (lhs[0, 0] > 0)
        return grouped_matmul(lhs, rhs, sizes)

    compiled = compile_with_gradients(chip, function, inputs)
    # Three products, of which each would be 8 times as many operations were all rows times all matrices.
    assert compiled.as_text().count("ragged-dot") >= 3
    assert compiled.cost_analysis()["flops"] < 1.5 * 3 * 2 * num_rows * k * n


@needs_libtpu
def test_is_what_tpus_take():
    lhs, rhs = jnp.ones((256, 128)), jnp.ones((2, 128, 128))
    compiled = topology.compile_for("v5e", grouped_matmul, lhs, rhs, jnp.array([100, 50]))
    assert "ragged-dot" in compiled.as_text()
    with pytest.raises(ValueError, match=r"'tpu' runs on \['tpu'\] only"):
        grouped_matmul(lhs, rhs, jnp.array([100, 50]), implementation="tpu")
