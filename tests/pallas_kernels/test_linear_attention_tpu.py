"""The TPU kernels of linear_attention: interpreted against the reference in float64, and compiled for absent chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from proof import CHIPS, assert_close, compile_with_gradients, needs_libtpu, relative_error
from test_linear_attention_kernel import random_segments

from pallas_kernels import LinearAttentionState, linear_attention, topology
from pallas_kernels.linear_attention import FEATURE_MAPS, FeatureMap, tpu, tpu_blocks
from pallas_kernels.linear_attention.tpu_features import kernel_features

SIGNED = FeatureMap(
    expand=lambda x: jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-2),
    similarity=lambda x, y: jnp.einsum(
        "...sd,...td->...st",
        *(jnp.concatenate([jax.nn.relu(z), jax.nn.relu(-z)], axis=-1) for z in (x, y)),
    ),
    num_features=lambda dim: 2 * dim,
)


def options_of(feature_map):
    # The weights of "identity" can sum to 0.
    return {"feature_map": feature_map, "normalize": feature_map != "identity"}


def function_of(implementation, length, has_segments, seed, feature_map, chunk_size=None):
    segment_ids = random_segments(np.random.default_rng(seed), 2, length) if has_segments else None

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


# Heads, D, length, whether there are segments, whether a state comes in. Blocks of 128 channels are turned.
CASES = {
    "chunks": (3, 6, 300, False, False),
    "whole chunks": (3, 6, 256, False, True),
    "segments": (3, 6, 300, True, False),
    "segments and a state": (3, 6, 200, True, True),
    "turned": (2, 64, 200, True, True),
    "many turned": (8, 16, 200, True, True),
    "one short chunk": (3, 6, 13, True, True),
}
# Of the Taylor map in float32 the others are for `-m slow`.
SHORT_CASES = ("segments and a state", "one short chunk")


@pytest.mark.parametrize(
    ("case", "feature_map", "dtype"),
    [(case, "taylor", "float32") for case in SHORT_CASES]
    + [("segments and a state", SIGNED, "float32")]
    + [pytest.param("segments and a state", "identity", "float32", marks=pytest.mark.slow)]
    + [
        pytest.param("turned", "elu+1", dtype, marks=pytest.mark.slow)
        for dtype in ("float32", "bfloat16")
    ]
    + [pytest.param("segments and a state", "softplus", "float32", marks=pytest.mark.slow)]
    + [
        pytest.param(case, "taylor", "bfloat16", marks=pytest.mark.slow)
        for case in ("segments and a state", "many turned")
    ]
    + [
        pytest.param(case, "taylor", "float32", marks=pytest.mark.slow)
        for case in CASES
        if case not in (*SHORT_CASES, "turned")
    ],
)
def test_kernels_with_every_gradient_equal_float64(rng, case, feature_map, dtype):
    heads, dim, length, has_segments, has_state = CASES[case]
    batch, value_dim = 2, dim - 1

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
        return function_of(implementation, length, has_segments, seed, feature_map)

    assert_close(make_function, inputs, cotangents, dtype, "tpu_interpret")


@pytest.mark.parametrize("dim", [1, 6, 16, 17, 24])
def test_the_taylor_map_of_the_kernels_is_the_public_one_in_another_order(rng, dim):
    features, public = kernel_features(FEATURE_MAPS["taylor"], dim), FEATURE_MAPS["taylor"].expand
    x = jnp.asarray(rng.normal(size=(dim, 128)), jnp.float32)
    want, pull = jax.vjp(public, x)
    gradient = jnp.asarray(rng.normal(size=want.shape), jnp.float32)

    def kernel(x, gradient, phi, d_x, ring):
        phi[...] = features.expand(x[...], ring)
        d_x[...] = features.pull(x[...], gradient[...], ring)

    padded = jnp.pad(x, ((0, features.dim - dim), (0, 0)))
    shapes = [
        jax.ShapeDtypeStruct((rows, 128), jnp.float32)
        for rows in (features.num_features, features.dim)
    ]
    ring = pltpu.VMEM((1, features.scratch_rows, 128), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shapes, scratch_shapes=[ring], interpret=True)
    phi, d_x = call(padded, features.from_public(gradient.T).T)
    np.testing.assert_allclose(features.to_public(phi.T).T, want, rtol=1e-6)
    np.testing.assert_allclose(features.from_public(features.to_public(phi.T)).T, phi, rtol=1e-6)
    # Both φ and its gradient have the factor whose square is the scale.
    want_d_x = features.scale * pull(gradient)[0]
    np.testing.assert_allclose(d_x[:dim], want_d_x, rtol=1e-4, atol=1e-5 * features.scale)
    product = jnp.asarray(rng.normal(size=9), jnp.float32)
    slope = jax.vmap(jax.grad(features.weigh))(product)
    scaled = features.slope_scale * features.slope(product)
    np.testing.assert_allclose(scaled, slope, rtol=1e-5)


def random_arrays(rng, batch, length=150, heads=2, dim=4):
    return [jnp.asarray(rng.normal(size=(batch, length, heads, dim)), jnp.float32) for _ in "qkv"]


@pytest.mark.slow
def test_several_steps_of_the_grid_without_races(rng, monkeypatch):
    """The interpreter that knows of transfers: it raises at a race, and takes parallel axes in random order."""
    monkeypatch.setattr(tpu_blocks, "MAX_HEADS", 1)
    monkeypatch.setattr(tpu_blocks, "MAX_TOKENS", 128)
    arrays = random_arrays(rng, 1, length=250)
    params = pltpu.InterpretParams(detect_races=True, random_seed=1)
    segment_ids = jnp.asarray(random_segments(rng, 1, 250))
    runs = jnp.where(segment_ids > 0, 1 + segment_ids - segment_ids[segment_ids > 0].min(), 0)
    options = {
        "feature_map": FEATURE_MAPS["taylor"],
        "chunk_size": 128,
        "normalize": True,
        "return_state": True,
    }

    def loss(q, k, v, *, interpret):
        out, state = tpu.linear_attention(
            q, k, v, runs, None, **options, eps=1e-6, interpret=interpret
        )
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.sin(x)) for x in state)

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, interpret=interpret), argnums=(0, 1, 2)))(*arrays)
        for interpret in (params, True)
    ]
    for got, want in zip(*gradients, strict=True):
        assert relative_error(got, want) < 1e-6


def test_block_sizes_do_not_matter(rng, monkeypatch):
    """Two heads at once are turned in the kernels, one alone is not."""
    arrays = random_arrays(rng, 1, length=260, heads=2, dim=64)

    def gradients(**options):
        options |= {"feature_map": "elu+1", "implementation": "tpu_interpret"}

        def loss(*x):
            return jnp.sum(jnp.sin(linear_attention(*x, **options)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    want = gradients()
    monkeypatch.setattr(tpu_blocks, "MAX_TOKENS", 128)
    monkeypatch.setattr(tpu_blocks, "MAX_HEADS", 1)
    for x, y in zip(gradients(chunk_size=200), want, strict=True):
        assert relative_error(x, y) < 1e-5


def test_under_vmap_and_remat(rng):
    arrays = [jnp.stack(x) for x in zip(*(random_arrays(rng, 1) for _ in range(3)), strict=True)]
    segment_ids = jnp.asarray(np.stack([random_segments(rng, 1, 150) for _ in range(3)]))

    def gradient(implementation, wrap=lambda f: f):
        def loss(q, k, v, segment_ids):
            out = linear_attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.vmap(jax.grad(wrap(loss), argnums=(0, 1, 2))))(*arrays, segment_ids)

    want = gradient("xla")
    for x, y in zip(gradient("tpu_interpret", jax.remat), want, strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.slow
def test_under_shard_map_with_keys_shared_by_all_devices(rng):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = random_arrays(rng, 4, heads=2)
    k = k[:1]
    split = PartitionSpec("data", None, "tensor")
    shared = PartitionSpec(None, None, "tensor")
    segment_ids = jnp.asarray(random_segments(rng, 4, 150))

    def op(implementation, q, k, v, segment_ids):
        k = jnp.broadcast_to(k, (q.shape[0], *k.shape[1:]))
        return linear_attention(q, k, v, segment_ids=segment_ids, implementation=implementation)

    sharded = jax.shard_map(
        functools.partial(op, "tpu_interpret"),
        mesh=mesh,
        in_specs=(split, shared, split, PartitionSpec("data")),
        out_specs=split,
    )

    def gradients(function):
        def loss(*x):
            return jnp.sum(jnp.sin(function(*x, segment_ids)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    want = gradients(functools.partial(op, "xla"))
    for x, y in zip(gradients(sharded), want, strict=True):
        assert relative_error(x, y) < 1e-5


# Feature map, D, Dv, heads.
TYPICAL = [("taylor", 16, 64, 8), ("identity", 128, 128, 8), ("elu+1", 64, 64, 8)]


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("feature_map", "dim", "value_dim", "heads", "dtype", "has_segments"),
    [(*shape, "bfloat16", False) for shape in TYPICAL]
    # Two sequences go together, of which values alone are turned.
    + [(SIGNED, 40, 64, 4, "bfloat16", True)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("taylor", 16, 128, 8, "bfloat16", False),
            ("taylor", 16, 64, 8, "bfloat16", True),
            ("taylor", 16, 64, 4, "bfloat16", True),
            ("taylor", 16, 64, 8, "float32", True),
            ("softplus", 64, 64, 8, "float32", False),
            (SIGNED, 40, 56, 8, "bfloat16", True),
        )
    ],
)
def test_compiles_for_tpu(chip, feature_map, dim, value_dim, heads, dtype, has_segments):
    batch, length = 2, 2000

    def function(q, k, v, segment_ids=None):
        segment_ids = jnp.ones((batch, length), int) if has_segments else None
        return linear_attention(q, k, v, **options_of(feature_map), segment_ids=segment_ids)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    inputs = {name: shape((batch, length, heads, dim)) for name in "qk"}
    inputs["v"] = shape((batch, length, heads, value_dim))
    compiled = compile_with_gradients(chip, function, inputs)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    # The features of queries and keys alone would be larger.
    taylor_features = 2 * batch * length * heads * 153 * 2
    if feature_map == "taylor" and dtype == "bfloat16":
        assert compiled.memory_analysis().temp_size_in_bytes < taylor_features


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_inside_a_sharded_step_with_states(chip):
    """Each of four chips has [2, 4096, 16, 16], with values of 64."""
    mesh = topology.mesh(f"{chip}:2x2", (2, 2), ("data", "tensor"))
    split = PartitionSpec("data", None, "tensor")
    by_head = PartitionSpec("data", "tensor")

    def op(q, k, v, kv, k_sum):
        state = LinearAttentionState(kv, k_sum)
        out, state = linear_attention(q, k, v, initial_state=state, return_state=True)
        return out, *state

    def step(*inputs):
        specs = (*(split,) * 3, by_head, by_head)
        out_specs = (split, by_head, by_head)
        sharded = jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=out_specs)
        outputs, pull = jax.vjp(sharded, *inputs)
        return outputs, pull(outputs)

    def shape(axes, spec, dtype):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(mesh, spec))

    tokens = functools.partial(shape, spec=split, dtype="bfloat16")
    state = functools.partial(shape, spec=by_head, dtype="float32")
    q, v = tokens((4, 4096, 32, 16)), tokens((4, 4096, 32, 64))
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(q, q, v, state((4, 32, 153, 64)), state((4, 32, 153)))
        compiled = lowered.compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def test_a_chunk_is_shorter_where_the_longer_one_does_not_fit():
    def chunk(dim, device_kind="TPU v6 lite", **options):
        features = kernel_features(FEATURE_MAPS["taylor"], dim).num_features
        found = tpu_blocks.blocks(
            batch=1,
            time=1024,
            heads=4,
            dim=dim,
            value_dim=64,
            num_features=features,
            dtype="float32",
            device_kind=device_kind,
            **options,
        )
        return found and found.chunk

    assert (chunk(16), chunk(80), chunk(16, "TPU v5 lite")) == (256, 128, 128)
    assert (chunk(16, chunk_size=300), chunk(80, chunk_size=256)) == (384, None)


def test_sequences_go_together_where_heads_are_few_and_every_core_has_as_many():
    def together(batch, heads, dim=16, device_kind="TPU v6 lite", time=512):
        sizes = {"time": time, "dim": dim, "value_dim": 64, "dtype": "bfloat16"}
        features = kernel_features(FEATURE_MAPS["taylor"], dim).num_features
        return tpu_blocks.blocks(
            batch=batch, heads=heads, num_features=features, device_kind=device_kind, **sizes
        ).sequences

    assert [together(12, heads) for heads in (8, 4, 3, 2, 1)] == [1, 2, 2, 4, 6]
    assert [together(batch, 1) for batch in (1, 7, 11)] == [1, 7, 1]
    assert [together(batch, 1, device_kind="TPU v4") for batch in (2, 4, 7)] == [1, 2, 1]
    # A state of more features, and a core of less memory, leave room for fewer.
    assert together(4, 1, dim=80) < together(4, 1)
    assert [together(4, 4, device_kind=f"TPU v{n}", time=1024) for n in (4, 5)] == [1, 2]


@needs_libtpu
def test_what_the_kernels_cannot_do_goes_elsewhere():
    captured = jnp.ones((4, 1))
    with_array = FeatureMap(
        lambda x: x * captured, FEATURE_MAPS["identity"].similarity, lambda dim: dim
    )
    with_expm1 = FeatureMap(
        lambda x: jnp.expm1(x) + 2, FEATURE_MAPS["identity"].similarity, lambda dim: dim
    )
    ones = jnp.ones((1, 8, 2, 4))
    for feature_map, reason in ((with_array, "captures constants"), (with_expm1, "expm1")):
        with pytest.raises(ValueError, match=f"feature_map.expand cannot .*{reason}"):
            linear_attention(
                ones, ones, ones, feature_map=feature_map, implementation="tpu_interpret"
            )
        compiled = topology.compile_for(
            "v5e", functools.partial(linear_attention, feature_map=feature_map), ones, ones, ones
        )
        assert "tpu_custom_call" not in compiled.as_text()
    halves = ones.astype(jnp.float16)
    with pytest.raises(ValueError, match="q has dtype float16; the kernels take float32 and bf"):
        linear_attention(halves, halves, halves, implementation="tpu_interpret")
    wide = jnp.ones((1, 8, 1, 512))
    with pytest.raises(ValueError, match=r"131841 features x 512 values does not fit into VMEM"):
        linear_attention(wide, wide, wide, implementation="tpu_interpret")
    long = jnp.ones((1, 4096, 1, 64))
    with pytest.raises(ValueError, match="does not fit into VMEM beside a chunk of 2048 tokens"):
        linear_attention(long, long, long, chunk_size=2048, implementation="tpu_interpret")
    with pytest.raises(ValueError, match=r"'tpu' runs on \['tpu'\] only"):
        linear_attention(ones, ones, ones, implementation="tpu")
