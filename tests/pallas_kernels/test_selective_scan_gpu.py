"""The GPU kernels of selective_scan: interpreted against the reference in float64, compiled for a GPU that is not here.

No test here runs on a GPU: interpreted are the semantics, with every copy, barrier and race between warpgroups;
compiled, down to machine code, is what an H100 would run.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_proof import detect_races, refused_for_the_chip
from jax.sharding import PartitionSpec
from proof import assert_close, needs_cuda_plugin, relative_error, rest_slow
from scan_cases import random_segments, weighted_sum
from test_selective_scan import in_float32, random_inputs
from test_selective_scan_tpu import shapes

from pallas_kernels import selective_scan, topology
from pallas_kernels.selective_scan import IMPLEMENTATIONS, gpu, gpu_chunks, gpu_parts, gpu_tile

# Batch, length, channels, states, whether there are segments, which optional arrays there are, dtype. The interpreter
# takes its time by tokens and by blocks of 128 channels, whatever they hold.
CASES = {
    "less than a chunk": (1, 3, 5, 3, False, ("D", "z"), "float32"),
    "whole chunks, a whole block": (1, 8, 128, 16, False, (), "float32"),
    "the widest state": (1, 7, 40, 32, True, ("D",), "float32"),
    "rows": (2, 6, 70, 5, True, ("z", "initial_state"), "float32"),
    "everything": (1, 14, 130, 9, True, ("D", "z", "initial_state"), "float32"),
    "everything, bfloat16": (1, 14, 130, 9, True, ("D", "z", "initial_state"), "bfloat16"),
}


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 4 tokens, two a step of the loop, so that a few tokens meet every border."""
    monkeypatch.setattr(gpu_chunks, "CHUNKS", (4,))
    monkeypatch.setattr(gpu_tile, "UNROLL", 2)


@pytest.mark.slow
def test_chunks_as_the_hardware_has_them(rng):
    inputs = in_float32(random_inputs(rng, 1, 20, 6, 4))
    inputs |= {name: inputs[name].astype(jnp.bfloat16) for name in "uBCz"}
    assert gpu_chunks.chunk_size(inputs["u"], inputs["delta"], inputs["z"], 8) == 16
    # And steps of another dtype than the rest.
    assert_like_xla(gradients, "gpu_interpret", inputs, tolerance=1e-2)


@pytest.mark.parametrize("case", rest_slow(CASES, "everything, bfloat16"))
def test_kernels_with_every_gradient_equal_float64(rng, short_chunks, case):
    batch, length, channels, states, has_segments, optional, dtype = CASES[case]
    inputs = random_inputs(rng, batch, length, channels, states)
    cotangents = {"y": rng.normal(size=inputs["u"].shape)}
    cotangents["state"] = rng.normal(size=inputs["initial_state"].shape)
    for name in {"D", "z", "initial_state"} - set(optional):
        del inputs[name]
    segment_ids = random_segments(rng, batch, length) if has_segments else None

    def make_function(implementation):
        def function(**inputs):
            y, state = selective_scan(
                **inputs,
                segment_ids=segment_ids,
                return_state=True,
                implementation=implementation,
            )
            return {"y": y, "state": state}

        return function

    assert_close(make_function, inputs, cotangents, dtype, "gpu_interpret")


@pytest.fixture
def race_detector(monkeypatch):
    detect_races(monkeypatch, IMPLEMENTATIONS, gpu.selective_scan)


def outputs(implementation, inputs, segment_ids=None):
    return selective_scan(
        **inputs, segment_ids=segment_ids, return_state=True, implementation=implementation
    )


def gradients(implementation, inputs, segment_ids=None):
    def loss(inputs):
        y, state = outputs(implementation, inputs, segment_ids)
        return weighted_sum(y, state)

    return jax.grad(loss)(inputs)


def assert_like_xla(function, implementation, inputs, segment_ids=None, tolerance=1e-5):
    got, want = (
        jax.jit(functools.partial(function, name))(inputs, segment_ids)
        for name in (implementation, "xla")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x.astype(jnp.float32), y.astype(jnp.float32)) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("function", [outputs, gradients])
def test_no_race_with_more_chunks_than_a_ring_holds(rng, short_chunks, race_detector, function):
    inputs = in_float32(random_inputs(rng, 1, 29, 70, 9))
    chunk = gpu_chunks.chunk_size(inputs["u"], inputs["delta"], inputs["z"], 16)
    assert 3 * chunk < 29
    segment_ids = jnp.asarray(random_segments(rng, 1, 29))
    assert_like_xla(function, "gpu_checked", inputs, segment_ids)


def test_time_in_parts_side_by_side(rng, short_chunks, monkeypatch):
    monkeypatch.setattr(gpu_parts, "SHORTEST", 4)
    inputs = in_float32(random_inputs(rng, 1, 17, 3, 2))
    assert gpu_parts.count(1, 17, 128) == 4
    # The second segment begins in the second part, and goes on in all others.
    segment_ids = jnp.asarray(np.arange(17) // 7 % 2 + 1)[None].at[:, 14:].set(2)
    assert_like_xla(gradients, "gpu_interpret", inputs, segment_ids)


def test_time_is_whole_where_rows_and_channels_are_enough():
    assert gpu_parts.count(2, 2048, 768) == 11
    assert gpu_parts.count(8, 2048, 1536) == gpu_parts.count(1, 400, 128) == 1


@pytest.mark.slow
def test_rows_of_padding_keep_the_state_and_have_no_gradient(rng, short_chunks):
    inputs = in_float32(random_inputs(rng, 2, 6, 3, 2))
    segment_ids = jnp.asarray(np.stack([np.zeros(6, int), random_segments(rng, 1, 6)[0]]))

    @jax.jit
    def both(inputs):
        (y, state), pull = jax.vjp(lambda x: outputs("gpu_interpret", x, segment_ids), inputs)
        return y, state, pull((jnp.cos(y), jnp.cos(state)))[0]

    y, state, got = both(inputs)
    assert np.all(y[0] == 0) and np.any(y[1] != 0)
    np.testing.assert_array_equal(state[0], inputs["initial_state"][0])
    for name in ("u", "delta", "B", "C", "z"):
        assert np.all(got[name][0] == 0) and np.any(got[name][1] != 0), name
    np.testing.assert_allclose(
        got["initial_state"][0], np.cos(inputs["initial_state"][0]), rtol=1e-5
    )


@pytest.mark.slow
def test_a_long_decay_underflows_to_zero_and_not_to_nan(rng, short_chunks):
    inputs = in_float32(random_inputs(rng, 1, 6, 3, 2))
    inputs["A"] *= 1e6
    got = jax.jit(functools.partial(gradients, "gpu_interpret"))(inputs)
    assert all(np.all(np.isfinite(x)) for x in got.values())
    # Nothing is left of the token before.
    y, _ = jax.jit(functools.partial(outputs, "gpu_interpret"))(inputs)
    now = jnp.sum(inputs["B"] * inputs["C"], axis=-1, keepdims=True) * inputs["delta"]
    want = (now + inputs["D"]) * inputs["u"] * jax.nn.silu(inputs["z"])
    assert relative_error(y, want) < 1e-5


@pytest.mark.slow
def test_under_vmap(rng, short_chunks):
    rows = [in_float32(random_inputs(rng, 1, 5, 5, 3)) for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    segment_ids = jnp.asarray(np.stack([random_segments(rng, 1, 5) for _ in range(2)]))

    def mapped(implementation, inputs, segment_ids):
        return jax.vmap(functools.partial(gradients, implementation))(inputs, segment_ids)

    assert_like_xla(mapped, "gpu_interpret", stacked, segment_ids)


@pytest.mark.parametrize("states", [8, 16, 32])
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32",) * 2]
)
def test_a_chunk_is_found_for_every_size(dtypes, states):
    u, delta = (jax.ShapeDtypeStruct((1, 1, 1), dtype) for dtype in dtypes)
    chunk = gpu_chunks.chunk_size(u, delta, u, states)
    assert chunk <= gpu_chunks.chunk_size(u, delta, None, states)
    # Gradients of B and C leave with at least one entry a thread.
    assert chunk * states >= 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict.fromkeys("uBC", "float16"), "u has dtype float16; the kernels take bfloat16 and fl"),
        ({"delta": "float16"}, "delta has dtype float16; the kernels take bfloat16 and float32"),
    ],
)
def test_a_dtype_that_the_kernels_do_not_take_is_refused(change, message):
    inputs = {name: jnp.ones(x.shape) for name, x in shapes(1, 20, 4, 4, "float32").items()}
    del inputs["z"]
    inputs |= {name: inputs[name].astype(dtype) for name, dtype in change.items()}
    with pytest.raises(ValueError, match=f"implementation='gpu_interpret' cannot: {message}"):
        selective_scan(**inputs, implementation="gpu_interpret")


def test_a_wider_state_is_refused():
    inputs = {name: jnp.ones(x.shape) for name, x in shapes(1, 20, 4, 33, "float32").items()}
    with pytest.raises(ValueError, match="33 states a channel; the kernels take up to 32"):
        selective_scan(**inputs, implementation="gpu_interpret")
    with pytest.raises(ValueError, match=r"'gpu' runs on \['gpu'\] only"):
        selective_scan(**inputs, implementation="gpu")


def test_a_gpu_that_is_no_hopper_is_refused():
    with refused_for_the_chip():
        jax.eval_shape(
            lambda x: selective_scan(**x, implementation="gpu"), shapes(1, 20, 4, 4, "float32")
        )


KERNELS = ("selective_scan_forward", "selective_scan_backward")


def out_and_gradients(function, inputs):
    out, pull = jax.vjp(function, inputs)
    return out, pull(out)


@needs_cuda_plugin
@pytest.mark.parametrize(
    ("shape", "dtypes", "has_segments"),
    [
        ((2, 2048, 1536, 16), ("bfloat16", "bfloat16"), True),  # Mamba 130M
        ((2, 2048, 1536, 16), ("bfloat16", "float32"), False),
        ((1, 1000, 200, 32), ("float32", "float32"), True),
        ((2, 50, 5, 3), ("bfloat16", "bfloat16"), False),
    ],
)
def test_compiles_for_gpu_with_gradients(shape, dtypes, has_segments):
    inputs = shapes(*shape, dtypes[0])
    inputs["delta"] = jax.ShapeDtypeStruct(shape[:3], dtypes[1])
    segment_ids = jnp.ones(shape[:2], int) if has_segments else None

    def function(inputs):
        return selective_scan(**inputs, segment_ids=segment_ids, implementation="gpu")

    compiled = topology.compile_for("h100", functools.partial(out_and_gradients, function), inputs)
    assert all(kernel in compiled.as_text() for kernel in KERNELS)
    # One state a token would be 16 arrays like u in float32.
    if shape[1] == 2048:
        assert compiled.memory_analysis().temp_size_in_bytes < 10 * np.prod(shape[:3]) * 4


@needs_cuda_plugin
def test_without_gradients_no_state_leaves_the_kernel_but_the_last():
    inputs = shapes(1, 384, 256, 16, "bfloat16")
    function = functools.partial(lambda x: selective_scan(**x, implementation="gpu"))
    chunks = r"f32\[1,24,16,16,16\]"  # the state before each of 24 chunks
    assert not re.search(chunks, topology.compile_for("h100", function, inputs).as_text())
    both = functools.partial(out_and_gradients, function)
    assert re.search(chunks, topology.compile_for("h100", both, inputs).as_text())


@needs_cuda_plugin
def test_compiles_for_gpu_under_vmap_remat_and_scan_of_layers():
    layers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, 2, *x.shape), x.dtype),
        shapes(1, 256, 128, 16, "bfloat16"),
    )

    def loss(inputs):
        return jnp.sum(selective_scan(**inputs, implementation="gpu").astype(jnp.float32))

    def total(layers):
        return jax.lax.scan(
            lambda sum_, x: (sum_ + jnp.sum(jax.vmap(jax.remat(loss))(x)), None), 0.0, layers
        )[0]

    text = topology.compile_for("h100", jax.grad(total), layers).as_text()
    assert all(kernel in text for kernel in KERNELS)


@needs_cuda_plugin
def test_compiles_for_gpus_under_shard_map():
    """Each device has rows of its own; the rates are shared, and their gradient is the sum over devices."""
    inputs = shapes(2, 512, 128, 16, "bfloat16")
    assert gpu_parts.count(1, 512, 128) > 1
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = {name: whole if name in "AD" else rows for name in inputs}
    function = jax.shard_map(
        lambda x: selective_scan(**x, implementation="gpu"), in_specs=(specs,), out_specs=rows
    )
    both = functools.partial(out_and_gradients, function)
    text = topology.compile_for("h100:1x2", both, inputs).as_text()
    assert all(kernel in text for kernel in KERNELS) and "all-reduce" in text


@needs_cuda_plugin
def test_the_kernel_has_to_be_named():
    inputs = shapes(1, 64, 128, 16, "bfloat16")
    text = topology.compile_for("h100", lambda x: selective_scan(**x), inputs).as_text()
    assert KERNELS[0] not in text
