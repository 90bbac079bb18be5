"""The TPU kernels of selective_scan: interpreted against the reference in float64, and compiled for absent chips."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from proof import CHIPS, assert_close, compile_with_gradients, needs_libtpu, relative_error
from scan_cases import random_segments, weighted_sum
from test_selective_scan import in_float32, random_inputs

from pallas_kernels import selective_scan, topology
from pallas_kernels.selective_scan import tpu, tpu_backward
from pallas_kernels.selective_scan.tpu_columns import wide_tokens
from pallas_kernels.selective_scan.tpu_tile import LEAST_STEPS, STEP, STEPS_OF_A_REGISTER

# Length, channels, states, whether there are segments, which optional arrays there are.
CASES = {
    "less than a chunk": (21, 5, 12, False, ("D", "z")),
    "whole chunks": (384, 128, 16, False, ()),
    "blocks of channels": (150, 300, 4, False, ("z", "initial_state")),
    "parts of a block": (130, 512, 3, True, ("D",)),
    "two parts of a block": (21, 140, 3, False, ("D",)),
    "a skip, segments": (150, 128, 5, True, ("D",)),
    "states that fill no tile": (40, 20, 20, False, ("initial_state",)),
    "tiles of two tokens": (40, 20, 64, False, ("initial_state",)),
    "two registers of columns": (250, 20, 3, True, ("D", "z")),
    "everything": (300, 100, 9, True, ("D", "z", "initial_state")),
}
# In float32 these are for `-m slow`.
LONG_CASES = (
    "whole chunks",
    "blocks of channels",
    "a skip, segments",
    "states that fill no tile",
    "tiles of two tokens",
    "everything",
)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("less than a chunk", "float32"),
        pytest.param("parts of a block", "float32", marks=pytest.mark.slow),
        ("a skip, segments", "bfloat16"),
        ("two parts of a block", "bfloat16"),
        pytest.param("everything", "bfloat16", marks=pytest.mark.slow),
        *(pytest.param(case, "float32", marks=pytest.mark.slow) for case in LONG_CASES),
    ],
)
def test_kernels_with_every_gradient_equal_float64(rng, case, dtype):
    length, channels, states, has_segments, optional = CASES[case]
    inputs = random_inputs(rng, 2, length, channels, states)
    # The backward divides by steps and rates.
    inputs["A"][:, 0], inputs["delta"][:, 1] = 0, 0
    cotangents = {"y": rng.normal(size=inputs["u"].shape)}
    cotangents["state"] = rng.normal(size=inputs["initial_state"].shape)
    for name in {"D", "z", "initial_state"} - set(optional):
        del inputs[name]
    segment_ids = random_segments(rng, 2, length) if has_segments else None

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

    assert_close(make_function, inputs, cotangents, dtype, "tpu_interpret")


@pytest.mark.parametrize("used", ["y", "state"])
def test_gradients_of_one_of_the_results_equal_float64(rng, used):
    inputs = random_inputs(rng, 1, 9, 5, 3)
    cotangent = rng.normal(size=inputs["u" if used == "y" else "initial_state"].shape)
    del inputs["D"], inputs["z"]
    # No state depends on C.
    only_read = {"C": inputs.pop("C")} if used == "state" else {}

    def make_function(implementation):
        def function(**inputs):
            dtype = inputs["u"].dtype
            read = {name: jnp.asarray(x, dtype) for name, x in only_read.items()}
            y, state = selective_scan(
                **inputs, **read, return_state=True, implementation=implementation
            )
            return {"y": y} if used == "y" else {"state": state}

        return function

    assert_close(make_function, inputs, {used: cotangent}, "float32", "tpu_interpret")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("case", "registers"), [("everything", 1), ("two registers of columns", 2)]
)
def test_trips_of_whole_registers_equal_float64(rng, monkeypatch, case, registers, dtype):
    """As the TPU's compiler has them."""
    monkeypatch.setattr(tpu, "INTERPRETED_STEPS", registers * STEPS_OF_A_REGISTER)
    test_kernels_with_every_gradient_equal_float64(rng, case, dtype)


def test_trips_of_the_backward_shorter_than_of_the_forward_equal_float64(rng, monkeypatch):
    """As v5e has them for blocks of many parts."""
    monkeypatch.setattr(tpu, "INTERPRETED_STEPS", 2 * LEAST_STEPS)
    monkeypatch.setattr(tpu_backward, "MOST_STEPS", LEAST_STEPS)
    test_kernels_with_every_gradient_equal_float64(rng, "less than a chunk", "float32")


@pytest.mark.parametrize("steps", [LEAST_STEPS, STEPS_OF_A_REGISTER])
def test_columns_of_a_step_in_both_kinds_equal_float64(rng, monkeypatch, steps):
    monkeypatch.setattr(tpu, "INTERPRETED_STEPS", steps)
    channels, states = 200, 3
    assert 0 < wide_tokens(jnp.bfloat16, channels=256, states=8) < STEP
    inputs = random_inputs(rng, 1, 140, channels, states)
    tokens = ("u", "delta", "B", "C", "z")
    narrow = {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in tokens}
    of_channels = {name: jnp.float32(inputs[name]) for name in inputs.keys() - tokens}
    with jax.enable_x64(True):
        wide = {name: np.float64(x) for name, x in (narrow | of_channels).items()}
        want = selective_scan(**wide, return_state=True, implementation="reference")
    got = selective_scan(**narrow, **of_channels, return_state=True, implementation="tpu_interpret")
    for x, y, most in zip(got, want, (1e-2, 1e-5), strict=True):
        assert relative_error(x, y) < most


@pytest.mark.slow
def test_several_chunks_without_races(rng):
    """The interpreter that knows of transfers: it raises at a race."""
    inputs = in_float32(random_inputs(rng, 1, 300, 5, 4))
    state, inputs["z"] = inputs.pop("initial_state"), None  # less to interpret
    resets = jnp.zeros((1, 300), bool).at[:, 90].set(True)

    def loss(inputs, state, interpret):
        y, last = tpu.selective_scan(**inputs, resets=resets, state=state, interpret=interpret)
        return weighted_sum(y, last)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    got = gradient(inputs, state, pltpu.InterpretParams(detect_races=True, random_seed=1))
    want = gradient(inputs, state, True)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("device_kind", ["TPU v5 lite", "TPU v6 lite"])
def test_bfloat16_with_and_without_vectors_of_it(rng, device_kind):
    inputs = in_float32(random_inputs(rng, 1, 300, 5, 4))
    state, resets = inputs.pop("initial_state"), jnp.zeros((1, 300), bool).at[:, 90].set(True)
    d_y = jnp.asarray(rng.normal(size=inputs["u"].shape), jnp.float32)

    def gradient(dtype, **options):
        def loss(inputs):
            narrow = {x: inputs[x].astype(dtype) for x in ("u", "delta", "B", "C", "z")}
            y, _ = tpu.selective_scan(
                **inputs | narrow, resets=resets, state=state, interpret=True, **options
            )
            return jnp.sum(y.astype(jnp.float32) * d_y)

        return jax.jit(jax.grad(loss))(inputs)

    # Rounded alike, so that only what the kernels round differs.
    for x in ("u", "delta", "B", "C", "z"):
        inputs[x] = inputs[x].astype(jnp.bfloat16).astype(jnp.float32)
    got, want = gradient(jnp.bfloat16, device_kind=device_kind), gradient(jnp.float32)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-2, name


@pytest.mark.slow
def test_under_vmap_and_remat(rng):
    layers = [in_float32(random_inputs(rng, 1, 140, 5, 3)) for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    segment_ids = jnp.asarray(np.stack([random_segments(rng, 1, 140) for _ in range(2)]))

    def gradient(implementation, wrap=lambda f: f):
        def loss(inputs, segment_ids):
            options = {"segment_ids": segment_ids, "implementation": implementation}
            return weighted_sum(selective_scan(**inputs, **options))

        return jax.jit(jax.vmap(jax.grad(wrap(loss))))(stacked, segment_ids)

    want = gradient("xla")
    for wrap in (lambda f: f, jax.remat):
        got = gradient("tpu_interpret", wrap)
        for name in want:
            assert relative_error(got[name], want[name]) < 1e-5, (wrap, name)


@pytest.mark.slow
def test_under_shard_map_with_rates_shared_by_all_rows(rng):
    if jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, there are {jax.device_count()}: set XLA_FLAGS")
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    inputs = in_float32(random_inputs(rng, 2, 16, 6, 3))
    del inputs["initial_state"], inputs["z"]  # less to interpret
    tokens, of_channel = PartitionSpec("data", None, "tensor"), PartitionSpec("tensor")
    specs = dict.fromkeys(inputs, tokens) | {"A": of_channel, "D": of_channel}
    specs |= dict.fromkeys("BC", PartitionSpec("data"))
    segment_ids = jnp.asarray(random_segments(rng, 2, 16))

    def op(implementation, inputs, segment_ids):
        return selective_scan(**inputs, segment_ids=segment_ids, implementation=implementation)

    sharded = jax.shard_map(
        functools.partial(op, "tpu_interpret"),
        mesh=mesh,
        in_specs=(specs, PartitionSpec("data")),
        out_specs=tokens,
    )

    def gradients(function):
        return jax.jit(jax.grad(lambda x: weighted_sum(function(x, segment_ids))))(inputs)

    got, want = gradients(sharded), gradients(functools.partial(op, "xla"))
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5, name


def shapes(batch, length, channels, states, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    wide = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    return {
        "u": shape((batch, length, channels)),
        "delta": shape((batch, length, channels)),
        "A": wide((channels, states)),
        "B": shape((batch, length, states)),
        "C": shape((batch, length, states)),
        "D": wide((channels,)),
        "z": shape((batch, length, channels)),
    }


def kernels_in(compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("shape", "dtype", "has_segments"),
    [
        ((2, 2048, 1536, 16), "bfloat16", True),  # Mamba 130M
        pytest.param((2, 2048, 1536, 16), "float32", False, marks=pytest.mark.slow),
        ((1, 300, 640, 64), "float32", True),  # the widest state that the kernels take
        # The largest block of it, which takes most VMEM.
        pytest.param((1, 512, 2048, 64), "float32", True, marks=pytest.mark.slow),
        ((2, 50, 5, 3), "bfloat16", False),
    ],
)
def test_compiles_for_tpu(chip, shape, dtype, has_segments):
    segment_ids = jnp.ones(shape[:2], int) if has_segments else None

    def function(**inputs):
        return selective_scan(**inputs, segment_ids=segment_ids)

    inputs = shapes(*shape, dtype)
    compiled = compile_with_gradients(chip, function, inputs)
    assert kernels_in(compiled) == 2
    # One state a token would be 16 arrays like u in float32.
    if shape[1] > 1000:
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * np.prod(shape[:3]) * 4


@needs_libtpu
def test_without_gradients_no_state_leaves_the_kernel_but_the_last():
    inputs = shapes(1, 128, 256, 16, "bfloat16")
    pasts = r"bf16\[1,8,16,256\]"  # the state before each of 8 steps
    forward = topology.compile_for("v5e", lambda x: selective_scan(**x), inputs)
    assert not re.search(pasts, forward.as_text())
    with_gradients = compile_with_gradients("v5e", selective_scan, inputs)
    assert re.search(pasts, with_gradients.as_text())
    # Nor are there zeros for a state before the first or a gradient of the last.
    assert not re.search(r"f32\[1,16,256\]\S* broadcast", with_gradients.as_text())


@needs_libtpu
def test_compiles_under_vmap_and_scan_of_layers():
    layers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, 2, *x.shape), x.dtype),
        shapes(1, 256, 128, 16, "bfloat16"),
    )

    def loss(inputs):
        return jnp.sum(selective_scan(**inputs).astype(jnp.float32))

    def total(layers):
        return jax.lax.scan(
            lambda sum_, x: (sum_ + jnp.sum(jax.vmap(jax.remat(loss))(x)), None), 0.0, layers
        )[0]

    assert kernels_in(topology.compile_for("v5e", jax.grad(total), layers)) == 2


@needs_libtpu
def test_what_the_kernels_cannot_do_goes_elsewhere():
    inputs = {name: jnp.ones(x.shape) for name, x in shapes(1, 20, 4, 4, "float32").items()}

    def for_tpu(**inputs):
        return topology.compile_for("v5e", lambda x: selective_scan(**x), inputs)

    assert kernels_in(for_tpu(**inputs)) == 1
    halves = inputs | {name: inputs[name].astype(jnp.float16) for name in "uBCz"}
    assert kernels_in(for_tpu(**halves)) == 0
    with pytest.raises(ValueError, match="u has dtype float16; the kernels take bfloat16 and fl"):
        selective_scan(**halves, implementation="tpu_interpret")
    wide = {name: jnp.ones(x.shape) for name, x in shapes(1, 20, 4, 65, "float32").items()}
    with pytest.raises(ValueError, match="65 states a channel; the kernels take up to 64"):
        selective_scan(**wide, implementation="tpu_interpret")
    with pytest.raises(ValueError, match=r"'tpu' runs on \['tpu'\] only"):
        selective_scan(**inputs, implementation="tpu")
