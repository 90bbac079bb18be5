"""The TPU kernels of ssd_scan: interpreted against the reference in float64, and compiled for absent chips."""

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
from test_ssd_scan import in_float32
from test_ssd_scan import random_inputs as random_inputs_of_any_step

from pallas_kernels import ssd_scan, topology
from pallas_kernels.dispatch import target
from pallas_kernels.ssd_scan import tpu, tpu_blocks

V5E, V6E = "TPU v5 lite", "TPU v6 lite"


def random_inputs(*arguments):
    """Steps as Mamba-2 begins with, from 0.001 to 0.1: what a state holds outlasts a chunk."""
    inputs = random_inputs_of_any_step(*arguments)
    inputs["dt"] *= 0.1
    return inputs


# Device kind, length, chunk, heads, P, groups, N, whether there are segments, which optional arrays there are.
CASES = {
    "one short chunk": (V5E, 7, None, 2, 64, 1, 6, False, ("D",)),
    "narrow heads": (V5E, 130, 128, 8, 16, 1, 6, True, ("D",)),
    "chunks": (V5E, 300, 256, 8, 64, 1, 6, False, ()),
    "steps of heads, segments, everything": (
        V5E,
        150,
        128,
        12,
        20,
        2,
        130,
        True,
        ("D", "initial_state"),
    ),
    "wide packs, segments": (V6E, 150, 256, 4, 64, 1, 6, True, ("initial_state",)),
    "wide heads, wide states": (V5E, 150, 100, 2, 100, 1, 128, False, ("D", "initial_state")),
    "wide packs of wide heads": (V6E, 256, 128, 4, 128, 2, 6, True, ("D",)),
}
# In float32 these are for `-m slow`.
LONG_CASES = (
    "wide packs, segments",
    "narrow heads",
    "chunks",
    "steps of heads, segments, everything",
    "wide packs of wide heads",
)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES if case not in LONG_CASES]
    + [("wide packs, segments", "bfloat16")]
    + [pytest.param(case, "float32", marks=pytest.mark.slow) for case in LONG_CASES],
)
def test_kernels_with_every_gradient_equal_float64(rng, monkeypatch, case, dtype):
    kind, length, chunk_size, heads, dim, groups, states, has_segments, optional = CASES[case]
    # A pack of heads, so that there are several steps of heads.
    monkeypatch.setattr(tpu_blocks, "MAX_CHANNELS", 256 if kind == V6E else 128)
    monkeypatch.setattr(tpu, "target", lambda: target()._replace(device_kind=kind))
    inputs = random_inputs(rng, 2, length, heads, dim, groups, states)
    cotangents = {"y": rng.normal(size=inputs["x"].shape)}
    cotangents["state"] = rng.normal(size=inputs["initial_state"].shape)
    for name in {"D", "initial_state"} - set(optional):
        del inputs[name]
    segment_ids = random_segments(rng, 2, length) if has_segments else None

    def make_function(implementation):
        def function(**inputs):
            y, state = ssd_scan(
                **inputs,
                segment_ids=segment_ids,
                return_state=True,
                chunk_size=chunk_size,
                implementation=implementation,
            )
            return {"y": y, "state": state}

        return function

    assert_close(make_function, inputs, cotangents, dtype, "tpu_interpret")


@pytest.mark.parametrize("used", ["y", "state"])
def test_gradients_of_one_of_the_results_equal_float64(rng, used):
    inputs = random_inputs(rng, 1, 9, 2, 64, 1, 6)
    cotangent = rng.normal(size=inputs["x" if used == "y" else "initial_state"].shape)
    # No state depends on these.
    only_read = {name: inputs.pop(name) for name in ("C", "D") if used == "state"}

    def make_function(implementation):
        def function(**inputs):
            dtype = inputs["x"].dtype
            read = {name: jnp.asarray(x, dtype) for name, x in only_read.items()}
            y, state = ssd_scan(**inputs, **read, return_state=True, implementation=implementation)
            return {"y": y} if used == "y" else {"state": state}

        return function

    assert_close(make_function, inputs, {used: cotangent}, "float32", "tpu_interpret")


@pytest.mark.slow
def test_several_steps_of_the_grid_without_races(rng, monkeypatch):
    """The interpreter that knows of transfers: it raises at a race, and takes parallel axes in random order."""
    monkeypatch.setattr(tpu_blocks, "MAX_CHANNELS", 128)
    inputs = in_float32(random_inputs(rng, 1, 200, 4, 64, 1, 4))
    state = inputs.pop("initial_state")
    reset = jnp.zeros((1, 200), bool).at[:, 90].set(True)

    def loss(inputs, state, interpret):
        y, last = tpu.ssd_scan(
            **inputs, reset=reset, state=state, chunk_size=128, interpret=interpret
        )
        return weighted_sum(y, last)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    got = gradient(inputs, state, pltpu.InterpretParams(detect_races=True, random_seed=1))
    want = gradient(inputs, state, True)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.slow
def test_a_step_that_is_forgotten_at_once_or_that_grows(rng):
    """Sums of dt A that would overflow if the decay were cut into factors, and an A that is not negative."""
    inputs = in_float32(random_inputs(rng, 1, 260, 2, 64, 1, 4))
    inputs["A"] = jnp.asarray([-1e5, 0.02])

    def gradients(implementation):
        def loss(inputs):
            y, state = ssd_scan(**inputs, return_state=True, implementation=implementation)
            return weighted_sum(y, state), y

        return jax.jit(jax.grad(loss, has_aux=True))(inputs)

    (got, y), (want, want_y) = gradients("tpu_interpret"), gradients("reference")
    assert relative_error(y, want_y) < 1e-4
    for name in want:
        assert np.all(np.isfinite(got[name])), name
        # Sines of large sums: float32 has few digits left.
        assert relative_error(got[name], want[name]) < 1e-3, name


@pytest.mark.slow
def test_under_vmap_and_remat(rng):
    layers = [in_float32(random_inputs(rng, 1, 140, 2, 64, 1, 4)) for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    segment_ids = jnp.asarray(np.stack([random_segments(rng, 1, 140) for _ in range(2)]))

    def gradient(implementation, wrap=lambda f: f):
        def loss(inputs, segment_ids):
            options = {"segment_ids": segment_ids, "chunk_size": 128}
            return weighted_sum(ssd_scan(**inputs, **options, implementation=implementation))

        return jax.jit(jax.vmap(jax.grad(wrap(loss))))(stacked, segment_ids)

    want, got = gradient("xla"), gradient("tpu_interpret", jax.remat)
    for name in want:
        assert relative_error(got[name], want[name]) < 2e-5, name


@pytest.mark.slow
def test_under_shard_map_with_rates_shared_by_all_rows(rng):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    inputs = in_float32(random_inputs(rng, 4, 130, 4, 64, 2, 4))
    del inputs["initial_state"]
    tokens, of_head = PartitionSpec("data", None, "tensor"), PartitionSpec("tensor")
    specs = dict.fromkeys(inputs, tokens) | {"A": of_head, "D": of_head}
    segment_ids = jnp.asarray(random_segments(rng, 4, 130))

    def op(implementation, inputs, segment_ids):
        return ssd_scan(**inputs, segment_ids=segment_ids, implementation=implementation)

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
        assert relative_error(got[name], want[name]) < 2e-5, name


def shapes(batch, length, heads, dim, groups, states, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    wide = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    return {
        "x": shape((batch, length, heads, dim)),
        "dt": wide((batch, length, heads)),
        "A": wide((heads,)),
        "B": shape((batch, length, groups, states)),
        "C": shape((batch, length, groups, states)),
        "D": wide((heads,)),
    }


def kernels_in(compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("shape", "dtype", "has_segments"),
    [
        ((2, 4096, 24, 64, 1, 128), "bfloat16", False),  # Mamba-2 130M
        pytest.param((2, 4096, 24, 64, 1, 128), "float32", True, marks=pytest.mark.slow),
        # The width of Mamba-2 2.7B, odd elsewhere.
        pytest.param((1, 2000, 80, 64, 8, 64), "bfloat16", True, marks=pytest.mark.slow),
        ((2, 50, 3, 5, 1, 6), "bfloat16", False),
    ],
)
def test_compiles_for_tpu(chip, shape, dtype, has_segments):
    segment_ids = jnp.ones(shape[:2], int) if has_segments else None

    def function(**inputs):
        return ssd_scan(**inputs, segment_ids=segment_ids)

    inputs = shapes(*shape, dtype)
    compiled = compile_with_gradients(chip, function, inputs)
    assert kernels_in(compiled) == 2
    # One state a token would be 32 times the inputs and more.
    if shape[1] > 1000:
        size = sum(np.prod(x.shape) * x.dtype.itemsize for x in inputs.values())
        assert compiled.memory_analysis().temp_size_in_bytes < 5 * size


@needs_libtpu
def test_without_gradients_no_state_leaves_the_kernel_but_the_last():
    inputs = shapes(1, 2048, 4, 64, 1, 128, "bfloat16")
    tiles = r"bf16\[1,32,128,256\]"  # the state before each of 32 tiles
    forward = topology.compile_for("v5e", lambda x: ssd_scan(**x), inputs)
    assert not re.search(tiles, forward.as_text())
    with_gradients = compile_with_gradients("v5e", ssd_scan, inputs)
    assert re.search(tiles, with_gradients.as_text())
    # Nor are there zeros for a state before the first or a gradient of the last.
    assert not re.search(r"f32\[1,128,256\]\S* broadcast", with_gradients.as_text())


@needs_libtpu
def test_compiles_under_vmap_and_scan_of_layers():
    layers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, 2, *x.shape), x.dtype),
        shapes(1, 256, 2, 64, 1, 128, "bfloat16"),
    )

    def loss(inputs):
        return jnp.sum(ssd_scan(**inputs).astype(jnp.float32))

    def total(layers):
        return jax.lax.scan(
            lambda sum_, x: (sum_ + jnp.sum(jax.vmap(jax.remat(loss))(x)), None), 0.0, layers
        )[0]

    assert kernels_in(topology.compile_for("v5e", jax.grad(total), layers)) == 2


@needs_libtpu
def test_what_the_kernels_cannot_do_goes_elsewhere():
    inputs = {name: jnp.ones(x.shape) for name, x in shapes(1, 1100, 2, 8, 1, 4, "float32").items()}

    def for_tpu(options, **inputs):
        return topology.compile_for("v5e", lambda x: ssd_scan(**x, **options), inputs)

    assert kernels_in(for_tpu({}, **inputs)) == 1
    assert kernels_in(for_tpu({"chunk_size": 1100}, **inputs)) == 0
    with pytest.raises(ValueError, match="chunk_size=1100; the kernels take up to 1024 tokens"):
        ssd_scan(**inputs, chunk_size=1100, implementation="tpu_interpret")
    halves = inputs | {name: inputs[name].astype(jnp.float16) for name in "xBC"}
    with pytest.raises(ValueError, match="x has dtype float16; the kernels take bfloat16 and fl"):
        ssd_scan(**halves, implementation="tpu_interpret")
    wide = {
        name: jnp.ones(x.shape) for name, x in shapes(1, 2, 128, 128, 1, 512, "float32").items()
    }
    with pytest.raises(ValueError, match="a state of 128 heads x 128 x 512 a group does not fit"):
        ssd_scan(**wide, implementation="tpu_interpret")
    with pytest.raises(ValueError, match=r"'tpu' runs on \['tpu'\] only"):
        ssd_scan(**inputs, implementation="tpu")
