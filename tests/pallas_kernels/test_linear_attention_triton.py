"""The Triton kernels of linear_attention: interpreted against the reference in float64, compiled for absent GPUs.

No test here runs on a GPU: interpreted are the semantics, one program after the other; compiled, down to machine code,
is what a GPU would run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from proof import assert_close, needs_cuda_plugin, out_and_gradients, relative_error
from test_linear_attention_kernel import random_segments

pytest.importorskip("jax_triton", reason="NOT PROVEN FOR TRITON: pip install 'effjax[triton]'")

from triton_proof import SHARED_MEMORY, compile_kernels

from pallas_kernels import LinearAttentionState, linear_attention, topology
from pallas_kernels.linear_attention import FEATURE_MAPS, FeatureMap


def options_of(feature_map):
    # The weights of "identity" can sum to 0.
    return {"feature_map": feature_map, "normalize": feature_map != "identity"}


def function_of(implementation, shape, has_segments, seed, feature_map, chunk_size):
    segment_ids = random_segments(np.random.default_rng(seed), *shape) if has_segments else None

    def function(q, k, v, **state):
        out, state = linear_attention(
            q,
            k,
            v,
            **options_of(feature_map),
            chunk_size=chunk_size,
            segment_ids=segment_ids,
            initial_state=LinearAttentionState(**state) if state else None,
            return_state=True,
            implementation=implementation,
        )
        return {"out": out, "kv": state.kv, "k_sum": state.k_sum}

    return function


# Length, tokens a chunk, whether there are segments, whether a state comes in.
CASES = {
    "chunks": (100, 64, False, False),
    "whole chunks": (128, 64, False, True),
    "segments": (140, 64, True, False),
    "segments and a state": (130, 64, True, True),
    "one short chunk": (13, None, True, True),
}


@pytest.mark.parametrize(
    ("case", "feature_map", "dtype", "dims"),
    [(case, "taylor", "float32", (6, 5)) for case in CASES]
    + [("segments and a state", name, "float32", (6, 5)) for name in ("identity", "elu+1")]
    + [("segments and a state", "softplus", "float32", (20, 40))]
    + [("segments and a state", name, "bfloat16", (6, 5)) for name in ("taylor", "elu+1")]
    # An odd ring, and features that take several tiles.
    + [("chunks", "taylor", "bfloat16", (17, 3))],
)
def test_kernels_with_every_gradient_equal_float64(rng, case, feature_map, dtype, dims):
    length, chunk_size, has_segments, has_state = CASES[case]
    batch, heads, (dim, value_dim) = 2, 1, dims

    def tokens(length):
        q, k = rng.normal(size=(2, batch, length, heads, dim))
        return {"q": q, "k": k, "v": rng.normal(size=(batch, length, heads, value_dim))}

    # As some tokens left it: with sums that no keys have, one tiny divisor would outweigh all other tokens.
    earlier = {name: jnp.asarray(x, jnp.float32) for name, x in tokens(16).items()}
    _, state = linear_attention(**earlier, feature_map=feature_map, return_state=True)
    state = {"kv": np.asarray(state.kv), "k_sum": np.asarray(state.k_sum)}
    inputs = tokens(length)
    cotangents = {"out": rng.normal(size=inputs["v"].shape)}
    cotangents |= {name: rng.normal(size=x.shape) for name, x in state.items()}
    if has_state:
        inputs |= state
    seed = rng.integers(1 << 32)

    def make_function(implementation):
        shape = (batch, length)
        return function_of(implementation, shape, has_segments, seed, feature_map, chunk_size)

    assert_close(make_function, inputs, cotangents, dtype, "triton_interpret")


def random_arrays(rng, batch, length, heads=1, dim=4):
    return [jnp.asarray(rng.normal(size=(batch, length, heads, dim)), jnp.float32) for _ in "qkv"]


def test_under_vmap_and_remat(rng):
    arrays = [jnp.stack(x) for x in zip(*(random_arrays(rng, 1, 70) for _ in "ab"), strict=True)]
    segment_ids = jnp.asarray(np.stack([random_segments(rng, 1, 70) for _ in "ab"]))

    def gradient(implementation):
        def loss(q, k, v, segment_ids):
            out = linear_attention(
                q, k, v, segment_ids=segment_ids, chunk_size=64, implementation=implementation
            )
            return jnp.sum(jnp.sin(out))

        function = jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1, 2)))
        return jax.jit(function)(*arrays, segment_ids)

    for x, y in zip(gradient("triton_interpret"), gradient("xla"), strict=True):
        assert relative_error(x, y) < 1e-5


def test_under_shard_map_with_keys_that_the_devices_share(rng):
    """Their gradient is the sum over the devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    q, k, v = random_arrays(rng, 2, 70)
    k = k[:1]
    split, whole = PartitionSpec("data"), PartitionSpec()

    def gradients(implementation):
        function = jax.shard_map(
            functools.partial(linear_attention, chunk_size=64, implementation=implementation),
            mesh=mesh,
            in_specs=(split, whole, split),
            out_specs=split,
        )
        loss = lambda *x: jnp.sum(jnp.sin(function(*x)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for x, y in zip(gradients("triton_interpret"), gradients("xla"), strict=True):
        assert relative_error(x, y) < 1e-5


def test_what_the_kernels_cannot_do_is_refused():
    own = FeatureMap(lambda x: x, FEATURE_MAPS["identity"].similarity, lambda dim: dim)
    for dtype, dim, feature_map, message in (
        ("float16", 4, "taylor", "dtype float16; it takes bfloat16, float32"),
        ("float32", 65, "taylor", r"D \+ Dv of 130; it takes up to 128 in float32"),
        ("float32", 4, own, "a feature map of your own; it takes taylor, identity"),
    ):
        x = jnp.ones((1, 8, 2, dim), dtype)
        with pytest.raises(ValueError, match=f"'triton_interpret' cannot: {message}"):
            linear_attention(x, x, x, feature_map=feature_map, implementation="triton_interpret")


KERNELS = (
    "linear_attention_states",
    "linear_attention_outputs",
    "linear_attention_queries_gradient",
    "linear_attention_keys_gradient",
)


def shapes(batch, length, heads, dim, value_dim, dtype="bfloat16"):
    sizes = [(batch, length, heads, size) for size in (dim, dim, value_dim)]
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


@pytest.mark.parametrize(
    ("feature_map", "dims", "dtype", "capability"),
    [
        ("taylor", (16, 64), "bfloat16", 80),
        ("taylor", (16, 64), "float32", 80),
        ("elu+1", (64, 64), "bfloat16", 80),
        pytest.param("taylor", (16, 128), "bfloat16", 86, marks=pytest.mark.slow),
        pytest.param("taylor", (32, 64), "bfloat16", 90, marks=pytest.mark.slow),
        pytest.param("softplus", (64, 64), "float32", 80, marks=pytest.mark.slow),
        pytest.param("identity", (128, 128), "bfloat16", 80, marks=pytest.mark.slow),
    ],
)
def test_compiles_to_machine_code(monkeypatch, feature_map, dims, dtype, capability):
    segment_ids = jnp.ones((2, 4096), jnp.int32)
    function = functools.partial(
        linear_attention,
        **options_of(feature_map),
        segment_ids=segment_ids,
        implementation="triton",
    )
    kernels = compile_kernels(
        monkeypatch,
        out_and_gradients(function),
        *shapes(2, 4096, 16, *dims, dtype),
        capability=capability,
    )
    assert {kernel.name for kernel in kernels} == set(KERNELS)
    for kernel in kernels:
        assert kernel.shared <= min(SHARED_MEMORY.values())
        assert max(kernel.spilled) <= 128


@needs_cuda_plugin
def test_compiles_into_a_program_for_a_gpu_in_which_no_features_reach_memory():
    batch, length, heads = 2, 4000, 8
    compiled = topology.compile_for(
        "h100",
        out_and_gradients(functools.partial(linear_attention, implementation="triton")),
        *shapes(batch, length, heads, 16, 64),
    )
    # States, outputs, gradients of states and two gradients; XLA sees that both passes make the same states.
    assert compiled.as_text().count("triton_kernel_call_ffi") == 5
    taylor_features = batch * length * heads * 153 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * taylor_features
