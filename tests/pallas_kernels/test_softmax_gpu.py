"""The GPU kernels of softmax and cross_entropy: interpreted against float64, compiled for a GPU that is not here.

No test here runs on a GPU: interpreted are the semantics; compiled, down to machine code, is what an H100 would run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_proof import detect_races, refused_for_the_chip
from jax.sharding import PartitionSpec
from proof import assert_close, needs_cuda_plugin, relative_error
from test_softmax import EXTREMES, extreme_rows

from pallas_kernels import cross_entropy, softmax, topology
from pallas_kernels.softmax import (
    CROSS_ENTROPY_IMPLEMENTATIONS,
    SOFTMAX_IMPLEMENTATIONS,
    gpu,
    gpu_rows,
)

# Whole tiles, tiles that overlap, rows that overlap, less than a tile or a block of rows.
SHAPES = {
    "whole tiles": ((4, 1024), "float32"),
    "tiles overlap": ((4, 300), "bfloat16"),
    "odd rows": ((3, 2, 77), "float32"),
    "short": ((2, 5), "bfloat16"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_softmax_with_its_gradient_equals_float64(rng, case):
    shape, dtype = SHAPES[case]

    def make_function(implementation):
        return lambda x: {"y": softmax(x, implementation=implementation)}

    inputs, cotangents = {"x": 2 * rng.normal(size=shape)}, {"y": rng.normal(size=shape)}
    assert_close(make_function, inputs, cotangents, dtype, "gpu_interpret")


@pytest.mark.parametrize("case", SHAPES)
def test_cross_entropy_with_its_gradient_equals_float64(rng, case):
    shape, dtype = SHAPES[case]
    labels = rng.integers(0, shape[-1], shape[:-1])
    labels.flat[:2] = shape[-1], -1  # no columns
    cotangents = {name: rng.normal(size=shape[:-1]) for name in ("loss", "lse")}

    def make_function(implementation):
        def function(logits):
            loss, lse = cross_entropy(logits, jnp.asarray(labels), implementation=implementation)
            return {"loss": loss, "lse": lse}

        return function

    inputs = {"logits": 4 * rng.normal(size=shape)}
    assert_close(make_function, inputs, cotangents, dtype, "gpu_interpret")


def test_extremes_are_as_jax_has_them(rng):
    x = extreme_rows(rng)
    labels = jnp.asarray(rng.integers(0, 700, len(x)))

    @jax.jit
    def both(x):
        options = {"implementation": "gpu_interpret"}
        return softmax(x, **options), *cross_entropy(x, labels, **options)

    y, loss, lse = both(x)
    for name, row, want in zip(EXTREMES, y, jax.nn.softmax(x), strict=True):
        np.testing.assert_allclose(row, want, rtol=1e-6, err_msg=name)
    want = -jax.nn.log_softmax(x)[jnp.arange(len(x)), labels]
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    # A row of NaN and infinity is NaN by JAX, and here the one or the other.
    single = np.array(list(EXTREMES)) != "NaN and inf"
    np.testing.assert_allclose(lse[single], jax.nn.logsumexp(x, axis=1)[single], rtol=1e-6)


def test_large_logits_lose_no_digits(rng):
    """A log-sum-exp of 1e4 is rounded to 1e-3; the loss and its gradient are not made from it."""
    x = jnp.asarray(1e4 + 3 * rng.normal(size=(4, 100)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 100, 4))

    def loss(x, implementation):
        return cross_entropy(x, labels, implementation=implementation)[0].sum()

    with jax.enable_x64(True):
        want = jax.value_and_grad(loss)(jnp.asarray(np.asarray(x), jnp.float64), "reference")
    got = jax.jit(jax.value_and_grad(loss), static_argnums=1)(x, "gpu_interpret")
    for value, expected in zip(got, want, strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("columns", [32, 77, 1024, 50257])
def test_tiles_meet_every_column_once(columns):
    tiles = gpu_rows.tiles(columns, itemsize=4)
    index = np.arange(tiles.width)

    def count(place, fresh, counts):
        return counts.at[place.start + index].add(index >= (fresh or 0))

    np.testing.assert_array_equal(tiles.fold(count, jnp.zeros(columns, int)), 1)


def test_tiles_are_of_wide_loads_where_rows_are_aligned():
    assert gpu_rows.tiles(32768, itemsize=2) == (32768, 1024, 8)
    assert gpu_rows.tiles(50257, itemsize=4) == (50257, 512, 1)
    assert gpu_rows.tiles(300, itemsize=2) == (300, 256, 4)
    assert gpu_rows.tiles(36, itemsize=2) == (36, 32, 1)


def arrays_of(rng, rows=6, columns=150):
    x = jnp.asarray(4 * rng.normal(size=(rows, columns)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, columns, rows))


def gradient_of_all(implementation, x, labels):
    """Of a number that every kernel is part of."""

    def total(x):
        loss, lse = cross_entropy(x, labels, implementation=implementation)
        y = softmax(x, implementation=implementation)
        return jnp.sum(jnp.sin(y)) + jnp.sum(loss * lse)

    return jax.grad(total)(x)


def test_no_race(rng, monkeypatch):
    detect_races(monkeypatch, SOFTMAX_IMPLEMENTATIONS, gpu.softmax)
    detect_races(monkeypatch, CROSS_ENTROPY_IMPLEMENTATIONS, gpu.cross_entropy)
    x, labels = arrays_of(rng, rows=8)
    got, want = (
        jax.jit(functools.partial(gradient_of_all, name))(x, labels)
        for name in ("gpu_checked", "reference")
    )
    assert relative_error(got, want) < 1e-5


def test_under_vmap(rng):
    x, labels = (jnp.stack(both) for both in zip(arrays_of(rng), arrays_of(rng), strict=True))
    got, want = (
        jax.jit(jax.vmap(functools.partial(gradient_of_all, name)))(x, labels)
        for name in ("gpu_interpret", "reference")
    )
    assert relative_error(got, want) < 1e-5


def test_what_the_kernels_cannot_do_is_refused():
    x, labels = jnp.ones((4, 6), jnp.float16), jnp.zeros(4, int)
    message = "implementation='gpu_interpret' cannot: dtype float16; the kernels take float32 and"
    with pytest.raises(ValueError, match=message):
        softmax(x, implementation="gpu_interpret")
    with pytest.raises(ValueError, match=message):
        cross_entropy(x, labels, implementation="gpu_interpret")
    with pytest.raises(ValueError, match=r"'gpu' runs on \['gpu'\] only"):
        softmax(x, implementation="gpu")


def test_a_gpu_that_is_no_hopper_is_refused():
    with refused_for_the_chip():
        jax.eval_shape(
            functools.partial(softmax, implementation="gpu"),
            jax.ShapeDtypeStruct((4, 6), jnp.float32),
        )


# The custom calls of Mosaic GPU, of which the forward and backward of both ops have four.
def kernels_in(compiled) -> int:
    return compiled.as_text().count('custom_call_target="mosaic_gpu')


@needs_cuda_plugin
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 4096, 32768), "bfloat16"),
        ((4, 1000, 50257), "float32"),
        ((3, 300000), "bfloat16"),
        ((2, 12, 512, 512), "float32"),
        ((5,), "float32"),
    ],
)
def test_compiles_for_gpu_with_gradients(shape, dtype):
    def both(x, labels):
        y, pull = jax.vjp(functools.partial(softmax, implementation="gpu"), x)
        outputs, pull_loss = jax.vjp(lambda x: cross_entropy(x, labels, implementation="gpu"), x)
        return y, pull(y), outputs, pull_loss(outputs)

    x, labels = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:-1], "int32")
    compiled = topology.compile_for("h100", both, x, labels)
    assert kernels_in(compiled) == 4
    # No copy of x and no probabilities.
    if len(shape) > 2:
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * np.prod(shape) / 8


@needs_cuda_plugin
def test_compiles_for_gpu_under_vmap_and_remat():
    def gradient(x, labels):
        return jax.remat(functools.partial(gradient_of_all, "gpu"))(x, labels)

    x, labels = jax.ShapeDtypeStruct((3, 8, 640), "bfloat16"), jax.ShapeDtypeStruct((3, 8), "int32")
    assert kernels_in(topology.compile_for("h100", jax.vmap(gradient), x, labels)) == 4


@needs_cuda_plugin
def test_compiles_for_gpus_under_shard_map_with_labels_shared_by_all():
    rows, whole = PartitionSpec("data"), PartitionSpec()
    function = jax.shard_map(
        functools.partial(gradient_of_all, "gpu"), in_specs=(rows, whole), out_specs=rows
    )
    x, labels = jax.ShapeDtypeStruct((16, 640), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")
    assert kernels_in(topology.compile_for("h100:1x2", function, x, labels)) == 4


@needs_cuda_plugin
def test_the_kernels_have_to_be_named():
    x, labels = jax.ShapeDtypeStruct((8, 640), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")

    def both(x, labels):
        return softmax(x), cross_entropy(x, labels)

    assert kernels_in(topology.compile_for("h100", both, x, labels)) == 0
