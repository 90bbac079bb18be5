"""The GPU kernels of grouped_matmul: interpreted against the reference in float64, compiled for an absent GPU.

No test here runs on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_proof import detect_races, refused_for_the_chip
from jax.sharding import PartitionSpec
from proof import assert_close, needs_cuda_plugin, relative_error, rest_slow

from pallas_kernels import grouped_matmul, topology
from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, gpu, gpu_rows

# [M, K, N] and the sizes of the groups; a tile has 128 rows.
CASES = {
    "groups that meet in a tile": ((200, 40, 70), [60, 0, 101, 9]),
    "whole tiles, wide blocks": ((256, 128, 256), [0, 128, 128, 0]),
    "several blocks along each axis": ((130, 130, 300), [130]),
    "no rows": ((30, 20, 20), [0, 0]),
}


def check(rng, case, implementation="gpu_interpret"):
    (num_rows, k, n), group_sizes = CASES[case]
    inputs = {
        "lhs": rng.normal(size=(num_rows, k)),
        "rhs": rng.normal(size=(len(group_sizes), k, n)),
    }
    sizes = jnp.asarray(group_sizes, jnp.int32)

    def make_function(implementation):
        def function(lhs, rhs):
            return {"out": grouped_matmul(lhs, rhs, sizes, implementation=implementation)}

        return function

    cotangents = {"out": rng.normal(size=(num_rows, n))}
    assert_close(make_function, inputs, cotangents, "bfloat16", implementation)


@pytest.mark.parametrize("case", rest_slow(CASES, "groups that meet in a tile"))
def test_values_and_every_gradient_equal_float64(rng, case):
    check(rng, case)


@pytest.mark.slow
def test_no_race_with_more_tiles_than_a_ring_holds(rng, monkeypatch):
    detect_races(monkeypatch, IMPLEMENTATIONS, gpu.grouped_matmul)
    monkeypatch.setitem(CASES, "long", ((270, 512, 20), [40, 225]))
    check(rng, "long", "gpu_checked")


def out_and_gradients(implementation):
    def function(lhs, rhs, sizes):
        def product(lhs, rhs):
            return grouped_matmul(lhs, rhs, sizes, implementation=implementation)

        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(jnp.cos(out))

    return function


@pytest.mark.slow
def test_rows_of_no_group_and_of_other_groups_are_nowhere(rng):
    lhs = jnp.asarray(rng.normal(size=(60, 4)), jnp.bfloat16).at[10:20].set(jnp.nan)
    lhs = lhs.at[50:].set(jnp.nan)
    rhs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.bfloat16)
    sizes = jnp.array([10, 10, 30])
    out, d_lhs, d_rhs = jax.jit(out_and_gradients("gpu_interpret"))(lhs, rhs, sizes)
    assert np.all(out[50:] == 0) and np.all(d_lhs[50:] == 0)
    of_others = np.r_[:10, 20:50]
    assert np.isfinite(out[of_others]).all() and np.isfinite(d_lhs[of_others]).all()
    assert np.isnan(d_rhs[1]).all() and np.isfinite(d_rhs[np.array([0, 2])]).all()


@pytest.mark.slow
def test_under_vmap(rng):
    lhs = jnp.asarray(rng.normal(size=(2, 40, 8)), jnp.bfloat16)
    rhs = jnp.asarray(rng.normal(size=(2, 8, 12)), jnp.bfloat16)
    sizes = jnp.array([[10, 20], [0, 33]])

    def function(implementation):
        return jax.jit(jax.vmap(out_and_gradients(implementation), in_axes=(0, None, 0)))

    got = function("gpu_interpret")(lhs, rhs, sizes)
    want = function("reference")(*(x.astype(jnp.float32) for x in (lhs, rhs)), sizes)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x.astype(jnp.float32), y) < 1e-2


def test_visits_are_the_tiles_of_every_group(rng):
    groups, num_rows = 5, 6 * 128
    visits = jax.jit(gpu_rows.visits, static_argnums=1)
    for _ in range(50):
        cuts = np.sort(rng.integers(0, num_rows + 1, groups))
        sizes = np.diff(cuts, prepend=0)
        if rng.random() < 0.5:  # groups that begin and end with tiles
            sizes = sizes // 128 * 128
        table = np.asarray(visits(jnp.asarray(sizes), num_rows))
        seen = np.full(num_rows, -1)
        for group, tile, start, end in table:
            own = np.arange(max(start, tile * 128), min(end, tile * 128 + 128))
            assert np.all(seen[own] == -1) and (len(own) > 0) == (end > start)
            seen[own] = group
        want = np.repeat(np.arange(groups + 1), [*sizes, num_rows - sizes.sum()])
        np.testing.assert_array_equal(seen, want)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_refused(dtype):
    lhs, rhs = jnp.ones((8, 4), dtype), jnp.ones((2, 4, 4), dtype)
    with pytest.raises(ValueError, match=f"cannot: dtype {dtype}; it takes bfloat16"):
        grouped_matmul(lhs, rhs, jnp.array([3, 4]), implementation="gpu_interpret")


def arrays(num_rows, k, n, num_groups):
    return (
        jax.ShapeDtypeStruct((num_rows, k), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_groups, k, n), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_groups,), jnp.int32),
    )


def test_a_gpu_that_is_no_hopper_is_refused():
    function = functools.partial(grouped_matmul, implementation="gpu")
    with refused_for_the_chip():
        jax.eval_shape(function, *arrays(8, 4, 4, 2))


def assert_has_kernels(compiled):
    text = compiled.as_text()
    assert "grouped_matmul_rows" in text and "grouped_matmul_matrices" in text


@needs_cuda_plugin
@pytest.mark.parametrize("sizes", [(4096, 1024, 4096, 8), (1000, 384, 200, 3)])
def test_compiles_for_gpu_with_gradients(sizes):
    compiled = topology.compile_for("h100", out_and_gradients("gpu"), *arrays(*sizes))
    assert_has_kernels(compiled)
    # Nothing like all rows times all matrices: copies with whole tiles at most.
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
    )


@needs_cuda_plugin
def test_compiles_for_gpu_under_vmap_and_remat():
    def loss(lhs, rhs, sizes):
        return jnp.sum(grouped_matmul(lhs, rhs, sizes, implementation="gpu").astype(jnp.float32))

    gradients = jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1)))
    stacked = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in arrays(256, 128, 128, 3)]
    assert_has_kernels(topology.compile_for("h100", gradients, *stacked))


@needs_cuda_plugin
def test_compiles_for_gpus_under_shard_map():
    """The devices share the matrices, whose gradient is the sum over them."""
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes, implementation="gpu"),
        in_specs=(rows, whole, whole),
        out_specs=rows,
    )

    def gradients(lhs, rhs, sizes):
        out, pull = jax.vjp(lambda lhs, rhs: sharded(lhs, rhs, sizes), lhs, rhs)
        return out, pull(out)

    compiled = topology.compile_for("h100:1x2", gradients, *arrays(512, 128, 128, 3))
    assert_has_kernels(compiled)
    assert "all-reduce" in compiled.as_text()


@needs_cuda_plugin
def test_the_kernels_have_to_be_named():
    text = topology.compile_for("h100", grouped_matmul, *arrays(256, 128, 128, 3)).as_text()
    assert "mosaic_gpu" not in text
