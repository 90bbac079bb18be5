"""Ops whose time axis is split over devices, beside the same ops of one device, with every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from proof import relative_error

import pallas_kernels
from pallas_kernels.linear_attention import LinearAttentionState

ROWS, TIME, DEVICES = 2, 48, 4
SPLIT, WHOLE = PartitionSpec(None, "context"), PartitionSpec()
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def mesh_of(count):
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices, there are {jax.device_count()}: set XLA_FLAGS")
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("context",), (AxisType.Auto,), devices=devices)


@pytest.fixture
def mesh():
    return mesh_of(DEVICES)


def normal(rng, *shape):
    """In float32, or float64 where that is in force."""
    return jnp.asarray(rng.normal(size=shape), float)


def random_segments(rng, time=TIME):
    """Segments that begin anywhere, with padding among them, a shard of nothing else and an id that returns."""
    ids = np.sort(rng.integers(1, 5, (ROWS, time)), axis=1)
    ids[rng.random((ROWS, time)) < 0.2] = 0
    ids[0, 12:24] = 0
    ids[1, 30:34] = ids[1, 2]
    return jnp.asarray(ids, jnp.int32)


def with_gradients(function, cotangents):
    """Jitted: the outputs, and the gradients of all arguments for cotangents of the outputs."""

    def both(*arguments):
        outputs, pull = jax.vjp(function, *arguments)
        return outputs, pull(jax.tree.map(lambda x, g: g.astype(x.dtype), outputs, cotangents))

    return jax.jit(both)


def assert_equal(got, want, tolerance):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < tolerance


@pytest.mark.parametrize(
    "options",
    [
        {"logits_soft_cap": 5.0},
        {"window": 17},  # more than a shard
        slow({"window": 5}),
        slow({"window": 40}),
        slow({"window": 1}),
        slow({"causal": False}),
        slow({"time": 36}),  # 9 a device, which have no halves
        slow({"positions": True}),
        slow({"positions": True, "window": 9}),
        slow({"segments": False}),
        slow({"segments": False, "window": 17}),
        slow({"implementation": "tpu_interpret"}),
        slow({"implementation": "tpu_interpret", "window": 17}),
    ],
    ids=str,
)
def test_attention(rng, mesh, options):
    options = dict(options)
    time = options.pop("time", TIME)
    heads, key_heads, dim = 4, 2, 8
    shapes = [(ROWS, time, count, dim) for count in (heads, key_heads, key_heads)]
    arrays = tuple(normal(rng, *shape) for shape in shapes)
    tokens = {}
    if options.pop("segments", True):
        tokens["segment_ids"] = random_segments(rng, time)
    if options.pop("positions", False):
        order = [rng.permutation(time) for _ in range(ROWS)]
        tokens["positions"] = jnp.asarray(np.stack(order), jnp.int32)

    def attend(axis_name, q, k, v, tokens):
        pairs = {name: (x, x) for name, x in tokens.items()}
        return pallas_kernels.attention(
            q, k, v, return_lse=True, axis_name=axis_name, **pairs, **options
        )

    of_shards = jax.shard_map(
        functools.partial(attend, "context"), mesh=mesh, in_specs=SPLIT, out_specs=SPLIT
    )
    cotangents = (normal(rng, *shapes[0]), normal(rng, ROWS, time, heads))
    got, want = (
        with_gradients(lambda *x, f=f: f(*x, tokens), cotangents)(*arrays)
        for f in (of_shards, functools.partial(attend, None))
    )
    assert_equal(got, want, 1e-5)


def linear_attention(rng):
    """The op, its arguments, which of them have a time axis, and a state."""
    heads, dim = 2, 4
    q, k, v = (normal(rng, ROWS, TIME, heads, dim) for _ in range(3))
    features = 1 + dim + dim * (dim + 1) // 2
    kv, k_sum = normal(rng, ROWS, heads, features, dim), normal(rng, ROWS, heads, features)
    state = LinearAttentionState(kv, k_sum.at[..., 0].set(9))
    return pallas_kernels.linear_attention, (q, k, v), (True,) * 3, state


def ssd_scan(rng):
    heads, dim, states = 2, 4, 3
    x, dt = normal(rng, ROWS, TIME, heads, dim), abs(normal(rng, ROWS, TIME, heads))
    b, c = (normal(rng, ROWS, TIME, 1, states) for _ in range(2))
    arguments = x, dt, -abs(normal(rng, heads)), b, c, normal(rng, heads)
    in_time = True, True, False, True, True, False
    return pallas_kernels.ssd_scan, arguments, in_time, normal(rng, ROWS, heads, dim, states)


def selective_scan(rng):
    channels, states = 4, 3
    u, z = (normal(rng, ROWS, TIME, channels) for _ in range(2))
    b, c = (normal(rng, ROWS, TIME, states) for _ in range(2))
    delta, a = abs(normal(rng, *u.shape)), -abs(normal(rng, channels, states))
    arguments = u, delta, a, b, c, normal(rng, channels), z
    in_time = True, True, False, True, True, False, True
    return pallas_kernels.selective_scan, arguments, in_time, normal(rng, ROWS, channels, states)


@pytest.mark.parametrize(
    ("make", "is_plain"),
    [
        (linear_attention, False),
        (selective_scan, False),
        slow(linear_attention, True),
        slow(ssd_scan, True),
        slow(ssd_scan, False),
        slow(selective_scan, True),
    ],
)
def test_recurrences(rng, mesh, make, is_plain):
    """With segments and a state before the first token, or without either; the state after the last token too."""
    with jax.enable_x64(True):  # gradients of a decay are small sums of large terms
        op, arguments, in_time, state = make(rng)
        segment_ids = None if is_plain else random_segments(rng)
        initial = () if is_plain else (state,)

        def run(axis_name, segment_ids, arguments, *initial):
            return op(
                *arguments,
                segment_ids=segment_ids,
                initial_state=initial[0] if initial else None,
                return_state=True,
                axis_name=axis_name,
            )

        specs = tuple(SPLIT if has_time else WHOLE for has_time in in_time)
        of_shards = jax.shard_map(
            functools.partial(run, "context"),
            mesh=mesh,
            in_specs=(SPLIT, specs, *[WHOLE for _ in initial]),
            out_specs=(SPLIT, WHOLE),
        )
        plain = functools.partial(run, None)
        shapes = jax.eval_shape(plain, segment_ids, arguments, *initial)
        cotangents = jax.tree.map(lambda x: normal(rng, *x.shape), shapes)
        got, want = (
            with_gradients(functools.partial(f, segment_ids), cotangents)(arguments, *initial)
            for f in (of_shards, plain)
        )
        assert_equal(got, want, 1e-10)


def test_memory_of_a_device_is_that_of_its_share():
    """Four times the devices for four times the tokens: attention forward and backward in the same memory."""

    def temporaries(devices):
        mesh = mesh_of(devices)
        x = jax.ShapeDtypeStruct((1, 1024 * devices, 2, 16), jnp.float32)

        def loss(q, k, v):
            attend = functools.partial(pallas_kernels.attention, axis_name="context")
            out = jax.shard_map(attend, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)(q, k, v)
            return jnp.sum(jnp.sin(out))

        where = jax.NamedSharding(mesh, SPLIT)
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=where, out_shardings=where)
        return step.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 1.1 * temporaries(2)


def test_lengths_that_leave_the_order_open_are_refused(mesh):
    q, k = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 16, 2, 4))
    attend = functools.partial(pallas_kernels.attention, axis_name="context")
    of_shards = jax.shard_map(attend, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)
    with pytest.raises(ValueError, match="Tq=2 and Tk=4 must agree, or give positions"):
        jax.eval_shape(of_shards, q, k, k)
