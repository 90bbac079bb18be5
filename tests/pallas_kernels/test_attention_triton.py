"""The Triton kernels of attention: interpreted against the reference in float64, compiled for GPUs that are not here.

No test here runs on a GPU: interpreted are the semantics, one program after the other; compiled, down to machine code,
is what a GPU would run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from proof import (
    assert_close,
    assert_close_to_xla,
    needs_cuda_plugin,
    out_and_gradients,
)
from test_attention_kernel import random_inputs, random_segments

pytest.importorskip("jax_triton", reason="NOT PROVEN FOR TRITON: pip install 'effjax[triton]'")

from triton_proof import SHARED_MEMORY, compile_kernels

from pallas_kernels import attention, topology
from pallas_kernels.attention import triton_blocks
from pallas_kernels.attention.triton_blocks import Blocks
from pallas_kernels.triton_call import Launch

# [B, Tq, Tk, H, Hkv] and options.
CASES = {
    "causal, grouped heads": ((1, 150, 150, 2, 1), {}),
    "window": ((1, 160, 200, 1, 1), {"window": 40, "scale": -0.3}),
    "window and segments": ((1, 150, 150, 1, 1), {"window": 65, "segments": True}),
    "bidirectional, soft cap": ((2, 70, 100, 1, 1), {"causal": False, "logits_soft_cap": 2.0}),
    "bidirectional, segments": ((2, 70, 90, 1, 1), {"causal": False, "segments": True}),
    "more queries than keys": ((1, 200, 90, 1, 1), {}),
    "positions in any order": ((1, 140, 70, 2, 2), {"positions": True, "segments": True}),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "bfloat16") for case in CASES]
    + [(case, "float32") for case in ("window", "bidirectional, soft cap")],
)
def test_kernels_with_every_gradient_equal_float64(rng, case, dtype):
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

    assert_close(make_function, inputs, cotangents, dtype, "triton_interpret")


def with_gradients(options, implementation="triton_interpret"):
    """A function of q, k, v: out, lse and the gradients of a sum over both, in which every row counts."""

    def loss(q, k, v):
        out, lse = attention(q, k, v, **options, return_lse=True, implementation=implementation)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.sin(seen)), (out, lse)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def random_arrays(rng, *lengths, dtype="bfloat16", **dims):
    inputs, _ = random_inputs(rng, *lengths, **dims)
    return [jnp.asarray(x, dtype) for x in inputs.values()]


@pytest.mark.parametrize(("dim", "value_dim"), [(70, 40), (130, 8)])
def test_float16_and_head_dims_that_fill_no_tile(rng, dim, value_dim):
    arrays = random_arrays(rng, 1, 40, 70, 1, 1, dim=dim, value_dim=value_dim, dtype="float16")
    got = jax.jit(with_gradients({"window": 20}))(*arrays)
    assert_close_to_xla(got, jax.jit(with_gradients({"window": 20}, "xla")), arrays, 1e-3)


def test_tiles_of_any_lengths_give_the_same(rng, monkeypatch):
    """A block of short tiles visits every kind: before, among and after those that need no mask."""
    arrays = random_arrays(rng, 1, 50, 70, 1, 1, dtype="float32")
    for options in ({}, {"window": 37}):
        want = jax.jit(with_gradients(options, "xla"))
        for table in ("FORWARD", "BACKWARD"):
            lengths = (int(x) for x in 2 ** rng.integers(3, 5, 2))
            monkeypatch.setattr(triton_blocks, table, {4: {64: Blocks(*lengths, Launch(4, 1))}})
        assert_close_to_xla(jax.jit(with_gradients(options))(*arrays), want, arrays, 1e-5)


def test_rows_that_see_nothing_give_zero_and_finite_gradients(rng):
    arrays = random_arrays(rng, 1, 120, 120, 1, 1)
    segment_ids = jnp.asarray(np.arange(120) // 60, jnp.int32)[None]  # the first half is padding
    gradients, (out, lse) = jax.jit(with_gradients({"segment_ids": segment_ids}))(*arrays)
    assert np.all(out[:, :60] == 0) and np.all(np.isneginf(lse[:, :60]))
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(lse[:, 60:]))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[:, :60] == 0) and np.any(gradient[:, 60:] != 0)


def test_tiles_outside_of_the_mask_are_never_visited(rng):
    """What a tile multiplies by 0 would still turn into NaN."""
    q, k, v = random_arrays(rng, 1, 128, 512, 1, 1)
    # The first query sees keys 355..384.
    k, v = k.at[:, :320].set(jnp.nan), v.at[:, :320].set(jnp.nan)
    (dq, dk, dv), (out, _) = jax.jit(with_gradients({"window": 30}))(q, k, v)
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(dq))
    assert np.all(dk[:, :320] == 0) and np.all(dv[:, :320] == 0)


def test_under_vmap_and_remat_with_segments_of_one_batch(rng):
    arrays = [jnp.stack([x, x[:, ::-1]]) for x in random_arrays(rng, 2, 70, 70, 1, 1)]
    segment_ids = jnp.asarray(random_segments(rng, 2, 70), jnp.int32)

    def gradients(implementation):
        def loss(q, k, v):
            options = {"segment_ids": segment_ids, "implementation": implementation}
            return jnp.sum(jnp.sin(attention(q, k, v, **options).astype(jnp.float32)))

        return jax.jit(jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1, 2))))

    assert_close_to_xla(gradients("triton_interpret")(*arrays), gradients("xla"), arrays)


def test_under_shard_map_with_keys_that_the_devices_share(rng):
    """Their gradient is the sum over the devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = random_arrays(rng, 1, 60, 60, 2, 1)
    heads, whole = PartitionSpec(None, None, "data"), PartitionSpec()

    def gradients(implementation):
        function = jax.shard_map(
            functools.partial(attention, implementation=implementation),
            mesh=mesh,
            in_specs=(heads, whole, whole),
            out_specs=heads,
        )
        loss = lambda *x: jnp.sum(jnp.sin(function(*x).astype(jnp.float32)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    assert_close_to_xla(gradients("triton_interpret")(*arrays), gradients("xla"), arrays)


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        ("float8_e5m2", 8, "dtype float8_e5m2; it takes float16, bfloat16, float32"),
        ("float32", 129, "head_dim 129; it takes up to 128 in float32"),
        ("bfloat16", 257, "head_dim 257; it takes up to 256 in bfloat16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(dtype, dim, message):
    q = jnp.ones((1, 4, 2, dim), dtype)
    with pytest.raises(ValueError, match=f"implementation='triton_interpret' cannot: {message}"):
        attention(q, q, q, implementation="triton_interpret")


def shapes(batch, length, heads, kv_heads, dim, dtype="bfloat16"):
    sizes = [(batch, length, count, dim) for count in (heads, kv_heads, kv_heads)]
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys")


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "options"),
    [
        ("bfloat16", 64, 80, {"window": 512, "logits_soft_cap": 50.0}),
        ("bfloat16", 128, 80, {}),
        ("float32", 64, 80, {"causal": False}),
        pytest.param("bfloat16", 128, 86, {}, marks=pytest.mark.slow),
        pytest.param("bfloat16", 128, 90, {}, marks=pytest.mark.slow),
        pytest.param("bfloat16", 64, 90, {}, marks=pytest.mark.slow),
        pytest.param("bfloat16", 256, 80, {}, marks=pytest.mark.slow),
        pytest.param("float16", 100, 80, {}, marks=pytest.mark.slow),
        pytest.param("float32", 128, 80, {}, marks=pytest.mark.slow),
    ],
)
def test_compiles_to_machine_code(monkeypatch, dtype, dim, capability, options):
    function = functools.partial(attention, **options, implementation="triton")
    kernels = compile_kernels(
        monkeypatch,
        out_and_gradients(function),
        *shapes(2, 4096, 8, 2, dim, dtype),
        capability=capability,
    )
    assert tuple(kernel.name for kernel in kernels) == KERNELS
    for kernel in kernels:
        # A table for every GPU since Ampere.
        assert kernel.shared <= min(SHARED_MEMORY.values())
        assert max(kernel.spilled) <= 64


@needs_cuda_plugin
def test_compiles_into_a_program_for_a_gpu():
    """By jax_triton; an H100, because XLA's description of one is here."""
    batch, length = 2, 1500
    segment_ids = jnp.ones((batch, length), jnp.int32)
    function = functools.partial(
        attention, window=512, segment_ids=segment_ids, implementation="triton"
    )
    compiled = topology.compile_for(
        "h100", out_and_gradients(function), *shapes(batch, length, 4, 2, 64)
    )
    text = compiled.as_text()
    assert text.count("triton_kernel_call_ffi") == len(KERNELS)
    # Linear in time: weights of T x T would take more.
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * memory.argument_size_in_bytes


@needs_cuda_plugin
def test_compiles_into_a_program_for_gpus_under_vmap_remat_and_shard_map():
    heads, whole = PartitionSpec(None, None, None, "data"), PartitionSpec()

    def loss(q, k, v):
        out = attention(q, k, v, window=100, implementation="triton")
        return jnp.sum(out.astype(jnp.float32))

    gradients = jax.shard_map(
        jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1, 2))),
        in_specs=(heads, whole, whole),
        out_specs=(heads, whole, whole),
    )
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes(2, 256, 4, 1, 64)]
    text = topology.compile_for("h100:1x2", gradients, *stacked).as_text()
    # The forward may run once, for its residuals, or twice.
    assert text.count("triton_kernel_call_ffi") >= len(KERNELS) and "all-reduce" in text
