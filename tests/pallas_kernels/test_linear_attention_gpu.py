"""The GPU kernels of linear_attention: interpreted against the reference in float64, compiled for an absent GPU.

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
from test_linear_attention_kernel import random_segments
from test_linear_attention_tpu import SIGNED, options_of

from pallas_kernels import LinearAttentionState, linear_attention, topology
from pallas_kernels.linear_attention import FEATURE_MAPS, IMPLEMENTATIONS, gpu
from pallas_kernels.linear_attention.gpu_features import gpu_features


def random_tokens(rng, length, batch=1, heads=1, dim=6, value_dim=5, spread=1):
    q, k = spread * rng.normal(size=(2, batch, length, heads, dim))
    return {"q": q, "k": k, "v": rng.normal(size=(batch, length, heads, value_dim))}


def random_state(rng, feature_map, **sizes):
    """As some tokens left it: with sums that no keys have, one tiny divisor would outweigh all other tokens."""
    earlier = {
        name: jnp.asarray(x, jnp.float32) for name, x in random_tokens(rng, 16, **sizes).items()
    }
    _, state = linear_attention(**earlier, feature_map=feature_map, return_state=True)
    return state


def function_of(implementation, **options):
    """A function of q, k, v and perhaps the parts of a state: a dict of the output and the state after it."""

    def function(q, k, v, **state):
        initial = LinearAttentionState(**state) if state else None
        out, state = linear_attention(
            q,
            k,
            v,
            **options,
            initial_state=initial,
            return_state=True,
            implementation=implementation,
        )
        return {"out": out, "kv": state.kv, "k_sum": state.k_sum}

    return function


# Feature map, length and options. The interpreter takes its time by blocks of 128 tokens, whatever they hold.
# Weights of a positive map differ the less the less vectors spread, and bfloat16 loses their differences, of which the
# gradient of a query is made.
CASES = {
    "segments and a state": ("taylor", 270, {"chunk_size": 128, "segments": True, "state": True}),
    "a group of two blocks": ("taylor", 200, {"segments": True}),
    "more features than a ring holds": ("taylor", 140, {"chunk_size": 100, "dim": 15}),
    "two heads and a state": ("elu+1", 100, {"heads": 2, "state": True, "spread": 2}),
    "wide": ("identity", 140, {"chunk_size": 1, "dim": 66, "value_dim": 65}),
    "wide, segments and a state": (
        "softplus",
        140,
        {"chunk_size": 128, "dim": 66, "segments": True, "state": True, "spread": 2},
    ),
    "a map of the caller, two rows": (SIGNED, 60, {"batch": 2, "segments": True}),
}


@pytest.mark.parametrize("case", rest_slow(CASES, "segments and a state"))
def test_kernels_with_every_gradient_equal_float64(rng, case):
    feature_map, length, options = CASES[case]
    named = ("batch", "heads", "dim", "value_dim", "spread")
    sizes = {name: options[name] for name in named if name in options}
    inputs = random_tokens(rng, length, **sizes)
    state = random_state(rng, feature_map, **sizes)._asdict()
    cotangents = {"out": rng.normal(size=inputs["v"].shape)}
    cotangents |= {name: rng.normal(size=x.shape) for name, x in state.items()}
    if "state" in options:
        inputs |= {name: np.asarray(x) for name, x in state.items()}
    segments = random_segments(rng, sizes.get("batch", 1), length)
    make_function = functools.partial(
        function_of,
        **options_of(feature_map),
        chunk_size=options.get("chunk_size"),
        segment_ids=segments if "segments" in options else None,
    )
    assert_close(make_function, inputs, cotangents, "bfloat16", "gpu_interpret")


@pytest.mark.parametrize("dim", [1, 6, 31, 32])
@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, SIGNED])
def test_features_are_products_of_picked_entries(rng, feature_map, dim):
    feature_map = FEATURE_MAPS.get(feature_map, feature_map)
    features = gpu_features(feature_map, dim)
    x, y = jnp.asarray(rng.normal(size=(2, 1, 5, 2, dim)), jnp.float32)

    def products(x):
        vectors = features.prepare(x)
        vectors = jnp.pad(vectors, [(0, 0)] * 3 + [(0, features.width - vectors.shape[-1])])
        return vectors, jnp.prod(vectors @ features.selectors.astype(jnp.float32)[:, None, None], 0)

    (vectors, of_x), (others, of_y) = products(x), products(y)
    want = feature_map.expand(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    count = features.num_features
    np.testing.assert_allclose(of_x[..., :count] * features.scales, want, rtol=1e-5, atol=1e-6)
    assert np.all(of_x[..., count:] == 0) and features.tiles * features.tile >= count
    similarity = jnp.sum(of_x * of_y * features.squared_scales, axis=-1)
    product = jnp.sum(vectors * others, axis=-1)
    weigh = features.weigh or (lambda product: product)
    np.testing.assert_allclose(weigh(product), similarity, rtol=1e-4, atol=1e-5)
    slope = features.slope or jnp.ones_like
    want = jax.vmap(jax.grad(weigh))(product.ravel()).reshape(product.shape)
    np.testing.assert_allclose(slope(product), want, rtol=1e-5)


def random_arrays(rng, length, **sizes):
    return [jnp.asarray(x, jnp.bfloat16) for x in random_tokens(rng, length, **sizes).values()]


def with_gradients(implementation, **options):
    """A function of q, k, v: the output, the state after it, and the gradients of a sum in which all of both counts."""

    def loss(q, k, v):
        outputs = function_of(implementation, **options)(q, k, v)
        scaled = {"out": 1, "kv": 0.1, "k_sum": 0.1}
        terms = [jnp.sum(jnp.sin(scaled[n] * x.astype(jnp.float32))) for n, x in outputs.items()]
        return sum(terms), outputs

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.fixture
def race_detector(monkeypatch):
    detect_races(monkeypatch, IMPLEMENTATIONS, gpu.linear_attention)


@pytest.mark.slow
def test_no_race_in_the_forward(rng, race_detector):
    arrays = random_arrays(rng, 200, dim=15)
    options = {"chunk_size": 128, "segment_ids": random_segments(rng, 1, 200)}
    got = jax.jit(function_of("gpu_checked", **options))(*arrays)
    assert_close_to_xla(got, function_of("xla", **options), arrays)


@pytest.mark.slow
def test_no_race_in_the_backward(rng, race_detector):
    arrays = random_arrays(rng, 200)
    got = jax.jit(with_gradients("gpu_checked"))(*arrays)
    assert_close_to_xla(got, jax.jit(with_gradients("xla")), arrays)


@pytest.mark.slow
def test_padding_gives_zero_and_no_gradients(rng):
    arrays = random_arrays(rng, 120)
    segment_ids = jnp.asarray(np.arange(120) // 60, jnp.int32)[None]  # the first half is padding
    function = with_gradients("gpu_interpret", segment_ids=segment_ids)
    gradients, outputs = jax.jit(function)(*arrays)
    assert np.all(outputs["out"][:, :60] == 0) and np.any(outputs["out"][:, 60:] != 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[:, :60] == 0) and np.any(gradient[:, 60:] != 0)


@pytest.mark.slow
def test_under_vmap_with_segments_of_one_batch(rng):
    arrays = [jnp.stack([x, x[:, ::-1]]) for x in random_arrays(rng, 70)]
    segment_ids = jnp.asarray(random_segments(rng, 1, 70), jnp.int32)

    def gradients(implementation):
        return jax.jit(jax.vmap(with_gradients(implementation, segment_ids=segment_ids)))

    assert_close_to_xla(gradients("gpu_interpret")(*arrays), gradients("xla"), arrays)


@pytest.mark.parametrize(
    ("dtype", "feature_map", "dim", "value_dim", "message"),
    [
        ("float16", "taylor", 8, 8, "dtype float16; it takes bfloat16"),
        ("float32", "taylor", 8, 8, "dtype float32; it takes bfloat16"),
        ("bfloat16", "taylor", 64, 8, "head_dim 64; the Taylor map takes up to 63"),
        ("bfloat16", SIGNED, 65, 8, "130 features; a map other than Taylor's takes up to 128"),
        ("bfloat16", "taylor", 8, 129, "values of 129; it takes up to 128"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(dtype, feature_map, dim, value_dim, message):
    q, v = (jnp.ones((1, 4, 2, size), dtype) for size in (dim, value_dim))
    with pytest.raises(ValueError, match=f"implementation='gpu_interpret' cannot: {message}"):
        linear_attention(q, q, v, feature_map=feature_map, implementation="gpu_interpret")


def test_a_gpu_that_is_no_hopper_is_refused():
    q = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
    with refused_for_the_chip():
        jax.eval_shape(functools.partial(linear_attention, implementation="gpu"), q, q, q)


def shapes(batch, length, heads, dim, value_dim):
    sizes = [(batch, length, heads, size) for size in (dim, dim, value_dim)]
    return [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]


KERNELS = tuple(
    f"linear_attention_{name}"
    for name in (
        "states",
        "outputs",
        "gradients_of_states",
        "gradient_of_queries",
        "gradient_of_keys_and_values",
    )
)
# Feature map, [B, T, H, D, Dv], whether there are segments.
COMPILED = {
    "BASED": ("taylor", (2, 4096, 16, 16, 64), False),
    "odd sizes, segments": ("taylor", (2, 2000, 4, 24, 100), True),
    "the widest Taylor map": ("taylor", (1, 512, 2, 63, 128), False),
    "wide, segments": ("elu+1", (1, 2048, 4, 128, 128), True),
}


@needs_cuda_plugin
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_gpu_with_gradients(case):
    feature_map, sizes, has_segments = COMPILED[case]
    segment_ids = jnp.ones(sizes[:2], jnp.int32) if has_segments else None
    function = functools.partial(
        linear_attention, feature_map=feature_map, segment_ids=segment_ids, implementation="gpu"
    )
    compiled = topology.compile_for("h100", out_and_gradients(function), *shapes(*sizes))
    text = compiled.as_text()
    assert all(kernel in text for kernel in KERNELS)
    if case == "BASED":
        # The features of all queries and keys alone would be larger, and so would be weights of T x T.
        features = gpu_features(FEATURE_MAPS["taylor"], 16).num_features
        features_bytes = 2 * 2 * np.prod(sizes[:3]) * features
        assert compiled.memory_analysis().temp_size_in_bytes < features_bytes


@needs_cuda_plugin
def test_compiles_for_gpu_under_vmap_and_remat():
    def loss(q, k, v):
        return jnp.sum(linear_attention(q, k, v, implementation="gpu").astype(jnp.float32))

    gradients = jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1, 2)))
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes(2, 256, 2, 8, 64)]
    text = topology.compile_for("h100", gradients, *stacked).as_text()
    assert all(kernel in text for kernel in KERNELS)


@needs_cuda_plugin
def test_compiles_for_gpus_under_shard_map():
    """The devices share the keys of a head, whose gradient is the sum over them; each has a state of its own."""
    heads, whole = PartitionSpec(None, None, "data"), PartitionSpec()

    def op(q, k, v, state):
        k = jnp.broadcast_to(k, q.shape)
        out, state = linear_attention(
            q, k, v, initial_state=state, return_state=True, implementation="gpu"
        )
        return out, state

    by_head = PartitionSpec(None, "data")
    function = jax.shard_map(
        op, in_specs=(heads, whole, heads, by_head), out_specs=(heads, by_head)
    )
    q, _, v = shapes(2, 256, 4, 16, 64)
    k = jax.ShapeDtypeStruct((2, 256, 1, 16), jnp.bfloat16)
    state = jax.eval_shape(lambda: LinearAttentionState.zeros(2, 4, 16, 64))
    compiled = topology.compile_for("h100:1x2", out_and_gradients(function), q, k, v, state)
    text = compiled.as_text()
    assert all(kernel in text for kernel in KERNELS) and "all-reduce" in text


@needs_cuda_plugin
def test_the_kernels_have_to_be_named():
    text = topology.compile_for("h100", linear_attention, *shapes(1, 256, 2, 16, 64)).as_text()
    assert not any(kernel in text for kernel in KERNELS)
