"""The GPU kernels of attention: interpreted against the reference in float64, compiled for a GPU that is not here.

No test here runs on a GPU: interpreted are the semantics, with every copy, barrier and race; compiled, down to machine
code, is what an H100 would run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_proof import detect_races, refused_for_the_chip
from jax.sharding import PartitionSpec
from proof import (
    assert_close,
    assert_close_to_xla,
    needs_cuda_plugin,
    out_and_gradients,
    rest_slow,
)
from test_attention_kernel import random_inputs, random_segments

from pallas_kernels import attention, topology
from pallas_kernels.attention import IMPLEMENTATIONS, gpu

# [B, Tq, Tk, H, Hkv] and options. The interpreter takes its time by blocks of 128 rows, whatever they hold.
CASES = {
    "causal, grouped heads": ((1, 210, 210, 2, 1), {}),
    "window and segments": ((1, 200, 200, 1, 1), {"window": 65, "segments": True}),
    "window": ((1, 200, 300, 1, 1), {"window": 40, "scale": -0.3}),
    "bidirectional, soft cap": ((1, 70, 200, 1, 1), {"causal": False, "logits_soft_cap": 2.0}),
    "bidirectional, segments": ((2, 70, 120, 1, 1), {"causal": False, "segments": True}),
    "more queries than keys": ((1, 240, 90, 1, 1), {}),
    "positions in any order": ((1, 140, 70, 1, 1), {"positions": True, "segments": True}),
}


@pytest.mark.parametrize(
    "case",
    rest_slow(CASES, "window and segments"),
)
def test_kernel_with_every_gradient_equals_float64(rng, case):
    (batch, num_queries, num_keys, heads, kv_heads), options = CASES[case]
    inputs, cotangents = random_inputs(rng, batch, num_queries, num_keys, heads, kv_heads)
    options = dict(options)
    if options.pop("segments", False):
        options["segment_ids"] = tuple(
            random_segments(rng, batch, length) for length in (num_queries, num_keys)
        )
    if options.pop("positions", False):
        options["positions"] = tuple(
            rng.integers(0, 100, (batch, length)) for length in (num_queries, num_keys)
        )

    def make_function(implementation):
        def function(q, k, v):
            out, lse = attention(q, k, v, **options, return_lse=True, implementation=implementation)
            return {"out": out, "lse": lse}

        return function

    assert_close(make_function, inputs, cotangents, "bfloat16", "gpu_interpret")


def with_gradients(options, implementation="gpu_interpret"):
    """A function of q, k, v: out, lse and the gradients of a sum over both, in which every row counts."""

    def loss(q, k, v):
        out, lse = attention(q, k, v, **options, return_lse=True, implementation=implementation)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.sin(seen)), (out, lse)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def random_arrays(rng, *lengths, **dims):
    inputs, _ = random_inputs(rng, *lengths, **dims)
    return [jnp.asarray(x, jnp.bfloat16) for x in inputs.values()]


@pytest.fixture
def race_detector(monkeypatch):
    detect_races(monkeypatch, IMPLEMENTATIONS, gpu.attention)


def test_no_race_in_the_forward_with_more_tiles_than_a_ring_holds(rng, race_detector):
    arrays = random_arrays(rng, 1, 70, 260, 1, 1, dim=70, value_dim=40)
    segment_ids = tuple(random_segments(rng, 1, length) for length in (70, 260))

    def function(implementation):
        return jax.jit(
            functools.partial(attention, segment_ids=segment_ids, implementation=implementation)
        )

    assert_close_to_xla(function("gpu_checked")(*arrays), function("xla"), arrays)


@pytest.mark.slow
def test_no_race_in_the_backward_with_more_tiles_than_a_ring_holds(rng, race_detector):
    arrays = random_arrays(rng, 1, 140, 140, 1, 1)
    got = jax.jit(with_gradients({}, "gpu_checked"))(*arrays)
    assert_close_to_xla(got, jax.jit(with_gradients({}, "xla")), arrays)


@pytest.mark.slow
def test_rows_that_see_nothing_give_zero_and_finite_gradients(rng):
    arrays = random_arrays(rng, 1, 120, 120, 1, 1)
    segment_ids = jnp.asarray(np.arange(120) // 60, jnp.int32)[None]  # the first half is padding
    gradients, (out, lse) = jax.jit(with_gradients({"segment_ids": segment_ids}))(*arrays)
    assert np.all(out[:, :60] == 0) and np.all(np.isneginf(lse[:, :60]))
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(lse[:, 60:]))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[:, :60] == 0) and np.any(gradient[:, 60:] != 0)


@pytest.mark.slow
def test_tiles_outside_of_the_mask_are_never_visited(rng):
    """What a tile multiplies by 0 would still turn into NaN."""
    q, k, v = random_arrays(rng, 1, 128, 512, 1, 1)
    # The first query sees keys 355..384.
    k, v = k.at[:, :256].set(jnp.nan), v.at[:, :256].set(jnp.nan)
    (dq, dk, dv), (out, _) = jax.jit(with_gradients({"window": 30}))(q, k, v)
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(dq))
    assert np.all(dk[:, :256] == 0) and np.all(dv[:, :256] == 0)


@pytest.mark.slow
def test_under_vmap_with_segments_of_one_batch(rng):
    arrays = [jnp.stack([x, x[:, ::-1]]) for x in random_arrays(rng, 1, 70, 70, 1, 1)]
    segment_ids = jnp.asarray(random_segments(rng, 1, 70), jnp.int32)

    def gradients(implementation):
        return jax.jit(jax.vmap(with_gradients({"segment_ids": segment_ids}, implementation)))

    got = gradients("gpu_interpret")(*arrays)
    assert_close_to_xla(got, gradients("xla"), arrays)


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        ("float16", 8, "dtype float16; it takes bfloat16"),
        ("float32", 8, "dtype float32; it takes bfloat16"),
        ("bfloat16", 129, "head_dim 129; it takes up to 128"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(dtype, dim, message):
    q = jnp.ones((1, 4, 2, dim), dtype)
    with pytest.raises(ValueError, match=f"implementation='gpu_interpret' cannot: {message}"):
        attention(q, q, q, implementation="gpu_interpret")


def test_a_gpu_that_is_no_hopper_is_refused():
    q = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
    with refused_for_the_chip():
        jax.eval_shape(functools.partial(attention, implementation="gpu"), q, q, q)


def shapes(batch, length, heads, kv_heads, dim):
    sizes = [(batch, length, count, dim) for count in (heads, kv_heads, kv_heads)]
    return [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]


KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
# [B, T, H, Hkv, D] and options.
COMPILED = {
    "grouped heads": ((1, 4096, 8, 2, 128), {}),
    "window, segments, soft cap": (
        (2, 2048, 4, 4, 64),
        {"window": 512, "segments": True, "logits_soft_cap": 50.0},
    ),
    "both directions, odd sizes": ((2, 1500, 2, 2, 100), {"causal": False, "segments": True}),
}


@needs_cuda_plugin
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_gpu_with_gradients(case):
    (batch, length, *sizes), options = COMPILED[case]
    options = dict(options)
    if options.pop("segments", False):
        options["segment_ids"] = jnp.ones((batch, length), jnp.int32)
    function = functools.partial(attention, **options, implementation="gpu")
    compiled = topology.compile_for(
        "h100", out_and_gradients(function), *shapes(batch, length, *sizes)
    )
    text = compiled.as_text()
    assert all(kernel in text for kernel in KERNELS)
    # Linear in time: weights of T x T would take more.
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * memory.argument_size_in_bytes


@needs_cuda_plugin
def test_compiles_for_gpu_under_vmap_and_remat():
    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, window=100, implementation="gpu").astype(jnp.float32))

    gradients = jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1, 2)))
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes(2, 256, 2, 1, 64)]
    text = topology.compile_for("h100", gradients, *stacked).as_text()
    assert all(kernel in text for kernel in KERNELS)


@needs_cuda_plugin
def test_compiles_for_gpus_under_shard_map():
    """The devices share the keys, whose gradient is the sum over them."""
    heads, whole = PartitionSpec(None, None, "data"), PartitionSpec()
    function = jax.shard_map(
        lambda q, k, v: attention(q, k, v, implementation="gpu"),
        in_specs=(heads, whole, whole),
        out_specs=heads,
    )
    compiled = topology.compile_for(
        "h100:1x2", out_and_gradients(function), *shapes(2, 256, 4, 1, 64)
    )
    text = compiled.as_text()
    assert all(kernel in text for kernel in KERNELS) and "all-reduce" in text


@needs_cuda_plugin
def test_the_kernel_has_to_be_named():
    text = topology.compile_for("h100", attention, *shapes(1, 256, 2, 1, 64)).as_text()
    assert KERNELS[0] not in text
