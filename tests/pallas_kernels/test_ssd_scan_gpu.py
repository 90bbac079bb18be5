"""The GPU kernels of ssd_scan: interpreted against the reference in float64, compiled for a GPU that is not here.

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
from proof import assert_close, compile_with_gradients, needs_cuda_plugin, rest_slow
from scan_cases import random_segments
from test_ssd_scan_tpu import random_inputs, shapes

from pallas_kernels import ssd_scan, topology
from pallas_kernels.ssd_scan import IMPLEMENTATIONS, gpu, gpu_block
from pallas_kernels.ssd_scan.gpu_chunk import CHUNK


@pytest.fixture
def few_blocks(monkeypatch):
    """Blocks take all heads of a group, as they do where arrays are large."""
    monkeypatch.setattr(gpu_block, "BLOCKS", 1)


def hold_against_float64(
    rng,
    sizes,
    *,
    optional=(),
    segment_ids=None,
    A=None,
    implementation="gpu_interpret",
    wrap=lambda function: function,
) -> None:
    """y, the state and their gradients in x, dt, B, C and the `optional` ones of A, D and the initial state.

    The gradient of A is a sum over tokens outside of the kernels, a number a head, in which fewer heads than 4 may all
    but cancel by chance.
    """
    inputs = random_inputs(rng, *sizes)
    cotangents = {"y": rng.normal(size=inputs["x"].shape)}
    cotangents["state"] = rng.normal(size=inputs["initial_state"].shape)
    rates = np.asarray(inputs["A"] if A is None else A, np.float32)
    for name in {"A", "D", "initial_state"} - set(optional):
        del inputs[name]

    def make_function(implementation):
        def function(**inputs):
            y, state = ssd_scan(
                **({"A": rates} | inputs),
                segment_ids=segment_ids,
                return_state=True,
                implementation=implementation,
            )
            return {"y": y, "state": state}

        return wrap(function)

    assert_close(make_function, inputs, cotangents, "bfloat16", implementation)


# [B, T, H, P, G, N], whether there are segments, which optional arrays. The interpreter takes its time by chunks of 128
# tokens and tiles of 64 channels, whatever they hold.
CASES = {
    "chunks, everything": ((1, 140, 4, 16, 1, 6), False, ("A", "D", "initial_state")),
    "segments over chunks, groups": ((1, 180, 2, 64, 2, 128), True, ("initial_state",)),
    "heads of two tiles, segments": ((1, 90, 2, 80, 1, 100), True, ("D",)),
    "one token": ((2, 1, 1, 8, 1, 4), False, ("D", "initial_state")),
}


@pytest.mark.parametrize("case", rest_slow(CASES, "heads of two tiles, segments"))
def test_kernels_with_every_gradient_equal_float64(rng, few_blocks, case):
    sizes, has_segments, optional = CASES[case]
    segment_ids = random_segments(rng, *sizes[:2]) if has_segments else None
    hold_against_float64(rng, sizes, optional=optional, segment_ids=segment_ids)


@pytest.mark.slow
def test_heads_of_a_group_in_several_blocks(rng):
    hold_against_float64(rng, (1, 30, 3, 16, 1, 6))


@pytest.mark.slow
def test_a_row_of_padding(rng):
    """y 0, no gradients, and the state stays."""
    segment_ids = random_segments(rng, 2, 30)
    segment_ids[0] = 0
    hold_against_float64(
        rng, (2, 30, 1, 8, 1, 4), optional=("initial_state",), segment_ids=segment_ids
    )


@pytest.mark.slow
def test_a_step_that_is_forgotten_at_once_or_that_grows(rng):
    """Sums of dt A that would overflow if the decay were cut into factors, and an A that is not negative."""
    hold_against_float64(rng, (1, 60, 2, 8, 1, 4), optional=("D", "initial_state"), A=[-1e5, 0.02])


@pytest.fixture
def race_detector(monkeypatch):
    detect_races(monkeypatch, IMPLEMENTATIONS, gpu.ssd_scan)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(1, 260, 1, 8, 1, 4), (1, 20, 3, 8, 1, 4)], ids=["chunks", "heads"]
)
def test_no_race_with_more_tiles_than_a_ring_holds(rng, few_blocks, race_detector, sizes):
    hold_against_float64(
        rng,
        sizes,
        optional=("D", "initial_state"),
        segment_ids=random_segments(rng, *sizes[:2]),
        implementation="gpu_checked",
    )


@pytest.mark.slow
def test_under_vmap(rng):
    def wrap(function):
        def mapped(**inputs):
            rows = jax.tree.map(lambda x: x[:, None], inputs)
            outputs = jax.vmap(lambda inputs: function(**inputs))(rows)
            return jax.tree.map(lambda x: x[:, 0], outputs)

        return mapped

    hold_against_float64(rng, (2, 30, 1, 8, 1, 4), optional=("initial_state",), wrap=wrap)


def test_bounds_are_the_first_token_read_and_the_last_that_reads(rng):
    reset = rng.random((3, 2 * CHUNK)) < 0.03
    begins, ends = gpu._bounds(jnp.asarray(reset))
    segment = np.cumsum(reset.reshape(3, 2, CHUNK), axis=-1)
    same = segment[..., :, None] == segment[..., None, :]
    np.testing.assert_array_equal(begins.reshape(segment.shape), same.argmax(axis=-1))
    last = CHUNK - 1 - same[..., ::-1].argmax(axis=-1)
    np.testing.assert_array_equal(ends.reshape(segment.shape), last)


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ((2, 4096, 24, 1), 4),  # 64 chunks of Mamba-2 130M: 384 blocks
        ((8, 4096, 24, 1), 12),
        ((8, 4096, 24, 4), 6),  # no more than a group has
        ((1, 128, 24, 1), 1),
    ],
)
def test_blocks_fill_the_processors(sizes, share):
    batch, time, tiles, groups = sizes
    x, B = np.empty((batch, time, tiles, 64), bool), np.empty((batch, time, groups, 128), bool)
    assert gpu_block.tiles_per_block(x, B) == share


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dtype": "float16"}, {}, "x has dtype float16; the kernels take bfloat16"),
        ({"dtype": "float32"}, {}, "x has dtype float32; the kernels take bfloat16"),
        ({"states": 129}, {}, "B has N = 129; the kernels take up to 128"),
        ({}, {"chunk_size": 129}, "chunk_size=129; the kernels take up to 128 tokens a chunk"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change, options, message):
    sizes = {"batch": 1, "length": 4, "heads": 2, "dim": 8, "groups": 1, "states": 4}
    inputs = shapes(**(sizes | {"dtype": "bfloat16"} | change))
    function = functools.partial(ssd_scan, **options, implementation="gpu_interpret")
    with pytest.raises(ValueError, match=f"implementation='gpu_interpret' cannot: {message}"):
        jax.eval_shape(lambda inputs: function(**inputs), inputs)


def test_a_gpu_that_is_no_hopper_is_refused():
    inputs = shapes(1, 4, 2, 8, 1, 4, "bfloat16")
    with refused_for_the_chip():
        jax.eval_shape(lambda inputs: ssd_scan(**inputs, implementation="gpu"), inputs)


KERNELS = (
    "ssd_scan_states",
    "ssd_scan_outputs",
    "ssd_scan_states_gradients",
    "ssd_scan_gradients_reading",
    "ssd_scan_gradients_writing",
)


@needs_cuda_plugin
@pytest.mark.parametrize(
    ("sizes", "has_segments", "has_skip"),
    [
        ((2, 4096, 24, 64, 1, 128), False, True),  # Mamba-2 130M
        ((1, 2000, 8, 128, 2, 64), True, False),
    ],
)
def test_compiles_for_gpu_with_gradients(sizes, has_segments, has_skip):
    inputs = shapes(*sizes, "bfloat16")
    if not has_skip:
        del inputs["D"]
    options = {"segment_ids": jnp.ones(sizes[:2], int)} if has_segments else {}
    function = functools.partial(ssd_scan, **options, implementation="gpu")
    compiled = compile_with_gradients("h100", function, inputs)
    text = compiled.as_text()
    assert all(kernel in text for kernel in KERNELS)
    # Linear in time: one state a token would take 50 times the inputs.
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 8 * memory.argument_size_in_bytes


@needs_cuda_plugin
def test_compiles_for_gpu_under_vmap_and_remat():
    def loss(inputs):
        return jnp.sum(ssd_scan(**inputs, implementation="gpu").astype(jnp.float32))

    inputs = shapes(2, 256, 2, 64, 1, 128, "bfloat16")
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), inputs)
    gradients = jax.vmap(jax.value_and_grad(jax.remat(loss)))
    text = topology.compile_for("h100", gradients, stacked).as_text()
    assert all(kernel in text for kernel in KERNELS)


@needs_cuda_plugin
def test_compiles_for_gpus_under_shard_map():
    """The devices share B and C, whose gradients are sums over them."""
    inputs = shapes(2, 256, 4, 64, 1, 128, "bfloat16")
    heads, of_head, whole = (
        PartitionSpec(None, None, "data"),
        PartitionSpec("data"),
        PartitionSpec(),
    )
    specs = {"x": heads, "dt": heads, "A": of_head, "B": whole, "C": whole, "D": of_head}

    def function(**inputs):
        return jax.shard_map(
            lambda inputs: ssd_scan(**inputs, implementation="gpu"),
            in_specs=(specs,),
            out_specs=heads,
        )(inputs)

    text = compile_with_gradients("h100:1x2", function, inputs).as_text()
    assert all(kernel in text for kernel in KERNELS) and "all-reduce" in text


@needs_cuda_plugin
def test_the_kernels_have_to_be_named():
    inputs = shapes(1, 256, 2, 64, 1, 128, "bfloat16")
    text = topology.compile_for("h100", lambda inputs: ssd_scan(**inputs), inputs).as_text()
    assert KERNELS[0] not in text
