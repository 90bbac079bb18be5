"""The kernels of grouped_matmul for TPU, interpreted on the CPU and compiled for chips that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from proof import CHIPS, assert_close, compile_with_gradients, needs_libtpu, relative_error

from pallas_kernels import grouped_matmul, topology
from pallas_kernels.grouped_matmul import reference, tpu, tpu_matrices, tpu_visits

interpreted = functools.partial(tpu.grouped_matmul, interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks along every axis of arrays that the interpreter is soon through with."""
    for name, value in {"DEPTH": 256, "COLUMNS": 128, "ROWS_OF_PARTS": 32}.items():
        monkeypatch.setattr(tpu_visits, name, value)
    for module in (tpu_visits, tpu_matrices):
        monkeypatch.setattr(module, "unit_rows", lambda: 16)


@pytest.mark.parametrize(
    ("shape", "group_sizes", "dtype"),
    [
        ((300, 7, 5), [70, 130, 1, 99], "float32"),
        ((300, 40, 300), [5, 0, 9, 64], "bfloat16"),
        ((200, 300, 150), [64, 16, 0, 120], "float32"),
        ((200, 300, 150), [0, 0, 0, 199], "bfloat16"),
        ((40, 9, 11), [0, 0, 40, 0], "float32"),
        ((11, 700, 9), [1, 0, 9, 1], "bfloat16"),
        ((40, 9, 11), [0, 0, 0, 0], "float32"),
    ],
)
def test_values_and_every_gradient_equal_float64(rng, small_blocks, shape, group_sizes, dtype):
    rows, depth, columns = shape
    inputs = {"lhs": rng.normal(size=(rows, depth)), "rhs": rng.normal(size=(4, depth, columns))}
    sizes = jnp.asarray(group_sizes, jnp.int32)

    def make_function(implementation):
        def function(lhs, rhs):
            return {"out": grouped_matmul(lhs, rhs, sizes, implementation=implementation)}

        return function

    cotangents = {"out": rng.normal(size=(rows, columns))}
    assert_close(make_function, inputs, cotangents, dtype, "tpu_interpret")


def test_rows_of_no_group_are_nowhere(rng, small_blocks):
    lhs = jnp.asarray(rng.normal(size=(50, 4)), jnp.float32).at[20:].set(jnp.nan)
    rhs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    out, pull = jax.vjp(lambda *x: interpreted(*x, jnp.array([5, 0, 15])), lhs, rhs)
    d_lhs, d_rhs = pull(jnp.ones_like(out))
    assert np.all(out[20:] == 0) and np.all(d_lhs[20:] == 0) and np.all(d_rhs[1] == 0)
    assert np.isfinite(out).all() and np.isfinite(d_lhs).all() and np.isfinite(d_rhs).all()


def test_the_walk_visits_what_a_group_has_and_nothing_twice(rng):
    sizes = rng.multinomial(rng.integers(1, 200), [0.5, 0.3, 0, 0.2])
    print(sizes)
    walk = tpu_visits.visits(jnp.asarray(sizes, jnp.int32), 208, 16, every_group=False)
    ends = np.cumsum(sizes)
    of_row = np.searchsorted(ends, np.arange(208), side="right")  # 4: of no group
    want = sorted({(group, row // 16) for row, group in enumerate(of_row)})
    got = list(zip(np.asarray(walk.group).tolist(), np.asarray(walk.tile).tolist(), strict=True))
    assert got[: len(want)] == want
    assert set(got[len(want) :]) <= {(5, 12)}  # of a group behind all others; the tile stays
    assert np.all(np.asarray(walk.bounds) == [0, *ends, 208, 208])


def test_several_steps_of_the_grid_without_races(rng, small_blocks):
    """The interpreter that knows of transfers: it raises at a race, and takes the parallel axis in random order."""
    lhs = jnp.asarray(rng.normal(size=(90, 300)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 300, 140)), jnp.float32)
    params = pltpu.InterpretParams(detect_races=True, random_seed=1)

    def total(lhs, rhs, multiply):
        return jnp.sum(jnp.sin(multiply(lhs, rhs, jnp.array([40, 0, 30]))))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    got = gradients(lhs, rhs, functools.partial(tpu.grouped_matmul, interpret=params))
    for x, y in zip(got, gradients(lhs, rhs, reference.grouped_matmul), strict=True):
        assert relative_error(x, y) < 1e-5


def test_under_vmap(rng):
    lhs = jnp.asarray(rng.normal(size=(2, 40, 4)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(2, 3, 4, 6)), jnp.float32)
    sizes = jnp.asarray([[10, 0, 20], [0, 40, 0]], jnp.int32)
    got, want = (jax.vmap(f)(lhs, rhs, sizes) for f in (interpreted, reference.grouped_matmul))
    assert relative_error(got, want) < 1e-5


def test_under_remat(rng):
    lhs = jnp.asarray(rng.normal(size=(40, 4)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)

    def gradients(multiply):
        def total(lhs, rhs):
            return jnp.sum(jnp.sin(multiply(lhs, rhs, jnp.array([10, 0, 20]))))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(lhs, rhs)

    wants = gradients(reference.grouped_matmul)
    for got, want in zip(gradients(jax.remat(interpreted)), wants, strict=True):
        assert relative_error(got, want) < 1e-5


def test_under_shard_map_with_matrices_shared_by_all_devices(rng):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    lhs = jnp.asarray(rng.normal(size=(8, 10, 4)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    sizes = jnp.asarray(rng.multinomial(9, [1 / 3] * 3, size=8), jnp.int32)
    rows = PartitionSpec("data")

    def by_device(lhs, rhs, sizes):
        return interpreted(lhs[0], rhs, sizes[0])[None]

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
    [
        (4096, 1024, 4096, "bfloat16"),
        (1000, 384, 200, "float32"),
        pytest.param(2048, 4096, 14336, "bfloat16", marks=pytest.mark.slow),  # Mixtral's
        pytest.param(4096, 5000, 1024, "float32", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_tpu(chip, num_rows, k, n, dtype):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    inputs = {"lhs": shape((num_rows, k)), "rhs": shape((8, k, n))}

    def function(lhs, rhs):
        # A value of the program, so that no compiler counts on it.
        sizes = jnp.full(8, num_rows // 9) + (lhs[0, 0] > 0)
        return grouped_matmul(lhs, rhs, sizes)

    compiled = compile_with_gradients(chip, function, inputs)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


@needs_libtpu
def test_is_what_tpus_take():
    lhs, rhs = jnp.ones((256, 128)), jnp.ones((2, 128, 128))
    compiled = topology.compile_for("v5e", grouped_matmul, lhs, rhs, jnp.array([100, 50]))
    assert "rows_times_matrices" in compiled.as_text()
    with pytest.raises(ValueError, match=r"'tpu' runs on \['tpu'\] only"):
        grouped_matmul(lhs, rhs, jnp.array([100, 50]), implementation="tpu")
    with pytest.raises(ValueError, match="cannot: dtype float16"):
        grouped_matmul(
            *(x.astype("float16") for x in (lhs, rhs)),
            jnp.array([100, 50]),
            implementation="tpu_interpret",
        )
