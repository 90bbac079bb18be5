"""attention: against NumPy loops, then the fast form against the reference in float64."""

import math
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import TOLERANCE, assert_close, relative_error, temporary_bytes

from pallas_kernels import attention
from pallas_kernels.attention import _attend, visits, xla
from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.mask import PADDING, Mask, Tokens

needs_triton = pytest.mark.skipif(find_spec("jax_triton") is None, reason="needs jax-triton")


def random_inputs(rng, batch, num_queries, num_keys, heads, kv_heads, dim=4, value_dim=6):
    inputs = {
        "q": 2 * rng.normal(size=(batch, num_queries, heads, dim)),
        "k": 2 * rng.normal(size=(batch, num_keys, kv_heads, dim)),
        "v": rng.normal(size=(batch, num_keys, kv_heads, value_dim)),
    }
    cotangents = {
        "out": rng.normal(size=(batch, num_queries, heads, value_dim)),
        "lse": rng.normal(size=(batch, num_queries, heads)),
    }
    return inputs, cotangents


def random_segments(rng, batch, length):
    """A few segments a row, in order, with padding before and after."""
    return (
        np.sort(rng.integers(1, 5, (batch, length)), axis=1)
        % 5
        * ((np.arange(length) > length // 9) & (np.arange(length) < length - length // 9))
    )


def by_loops(q, k, v, *, causal, window, segments, positions, scale, soft_cap):
    """One query at a time, one head at a time, with the keys it sees picked out."""
    batch, num_queries, heads, _ = q.shape
    num_keys = k.shape[1]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    lse = np.full(q.shape[:3], -np.inf)
    for b, i, h in np.ndindex(batch, num_queries, heads):
        seen = []
        for j in range(num_keys):
            at, of = (i + num_keys - num_queries, j)
            if positions is not None:
                at, of = positions[0][b, i], positions[1][b, j]
            ok = (not causal or of <= at) and (window is None or at - of < window)
            if segments is not None:
                ok = ok and segments[0][b, i] == segments[1][b, j] != 0
            if ok:
                seen.append(j)
        if seen:
            group = heads // k.shape[2]
            logits = scale * k[b, seen, h // group] @ q[b, i, h]
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            lse[b, i, h] = np.log(np.sum(np.exp(logits)))
            out[b, i, h] = np.exp(logits - lse[b, i, h]) @ v[b, seen, h // group]
    return out, lse


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "options"),
    [
        (7, 7, {}),
        (7, 7, {"window": 3, "segments": True}),
        (5, 9, {"causal": False, "soft_cap": 1.5, "scale": 0.7}),
        (9, 5, {"positions": True, "window": 4}),
    ],
)
def test_equals_loops_over_rows(rng, implementation, num_queries, num_keys, options):
    inputs, _ = random_inputs(rng, 2, num_queries, num_keys, 4, 2)
    segments = positions = None
    if options.get("segments"):
        segments = (rng.integers(0, 3, (2, num_queries)), rng.integers(0, 3, (2, num_keys)))
    if options.get("positions"):
        positions = (rng.integers(0, 9, (2, num_queries)), rng.integers(0, 9, (2, num_keys)))
    causal, window = options.get("causal", True), options.get("window")
    scale, soft_cap = options.get("scale"), options.get("soft_cap")
    want = by_loops(
        **inputs,
        causal=causal,
        window=window,
        segments=segments,
        positions=positions,
        scale=1 / math.sqrt(4) if scale is None else scale,
        soft_cap=soft_cap,
    )
    got = attention(
        **{name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()},
        causal=causal,
        window=window,
        segment_ids=segments,
        positions=positions,
        scale=scale,
        logits_soft_cap=soft_cap,
        return_lse=True,
        implementation=implementation,
    )
    assert relative_error(got[0], want[0]) < 1e-5
    assert relative_error(got[1], want[1]) < 1e-5


# With 8 heads in a tile its blocks are of 64 or less, so that these lengths are several tiles, the last one padded, and
# the rows of the batch take turns.
SMALL_TILE = 2**15
CASES = {
    "causal, grouped heads": ((131, 131, 8, 2), {}),
    "window and segments": ((200, 200, 8, 8), {"window": 17, "segments": True}),
    "bidirectional, soft cap": ((70, 133, 8, 4), {"causal": False, "logits_soft_cap": 2.0}),
    "more queries than keys": ((150, 90, 8, 1), {}),
    "more keys than queries": ((90, 150, 8, 8), {"window": 50}),
    "positions in any order": ((140, 100, 8, 2), {"positions": True, "segments": True}),
    "one query": ((1, 130, 8, 2), {"segments": True}),
}
SLOW = ("more queries than keys", "one query")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, "float32", marks=[pytest.mark.slow] if case in SLOW else [])
        for case in CASES
    ]
    + [("causal, grouped heads", "bfloat16")]
    + [pytest.param("window and segments", "bfloat16", marks=pytest.mark.slow)],
)
def test_xla_with_every_gradient_equals_float64(rng, monkeypatch, case, dtype):
    monkeypatch.setattr(xla, "TILE", SMALL_TILE)
    (num_queries, num_keys, heads, kv_heads), options = CASES[case]
    inputs, cotangents = random_inputs(rng, 8, num_queries, num_keys, heads, kv_heads)
    options = dict(options)
    if options.pop("segments", False):
        queries, keys = (random_segments(rng, 8, length) for length in (num_queries, num_keys))
        options["segment_ids"] = (np.ones_like(queries) if num_queries == 1 else queries, keys)
    if options.pop("positions", False):
        options["positions"] = tuple(
            rng.integers(0, 100, (8, length)) for length in (num_queries, num_keys)
        )

    def make_function(implementation):
        def function(q, k, v):
            out, lse = attention(q, k, v, **options, return_lse=True, implementation=implementation)
            return {"out": out, "lse": lse}

        return function

    assert_close(make_function, inputs, cotangents, dtype)


def test_rows_that_see_nothing_give_zero_and_finite_gradients(rng):
    inputs, _ = random_inputs(rng, 2, 20, 20, 2, 2)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs.values())
    segment_ids = jnp.asarray(
        np.arange(20) // 5 * np.ones((2, 1)), jnp.int32
    )  # the first 5 are padding

    def loss(q, k, v):
        out, lse = attention(q, k, v, segment_ids=segment_ids, return_lse=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.exp(lse)), (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.all(out[:, :5] == 0) and np.all(np.isneginf(lse[:, :5]))
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(lse[:, 5:]))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[:, :5] == 0) and np.any(gradient[:, 5:] != 0)


def test_tiles_outside_of_the_mask_are_never_visited(rng):
    """What a tile multiplies by 0 would still turn into NaN."""
    inputs, _ = random_inputs(rng, 8, 64, 512, 8, 8)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs.values())
    # The first query sees keys 418..448.
    k, v = k.at[:, :384].set(jnp.nan), v.at[:, :384].set(jnp.nan)

    @jax.jit
    def forward_and_backward(q):
        out, pull = jax.vjp(lambda q: attention(q, k, v, window=31), q)
        return out, pull(out)[0]

    for x in forward_and_backward(q):
        assert np.all(np.isfinite(x))

    # Causal: the first half of the queries never meets the second half of the keys.
    q = jnp.asarray(rng.normal(size=(8, 512, 8, 4)), jnp.float32)
    k, v = q.at[:, 256:].set(jnp.nan), q.at[:, 256:].set(jnp.nan)
    out = jax.jit(attention)(q, k, v)
    assert np.all(np.isfinite(out[:, :256])) and np.all(np.isnan(out[:, 256:]))


def test_static_bounds_are_the_tightest(rng):
    for _ in range(200):
        num_queries, num_keys = rng.integers(1, 30, 2).tolist()
        window = None if rng.random() < 0.3 else int(rng.integers(1, 20))
        mask = Mask(num_queries, num_keys, causal=True, window=window, is_ordered=True)
        distance = np.arange(num_queries)[:, None] + num_keys - num_queries - np.arange(num_keys)
        allowed = (distance >= 0) & (distance < (window or np.inf))
        for bounds, rows in ((mask.keys_of, allowed), (mask.queries_of, allowed.T)):
            start, stop = sorted(rng.choice(len(rows) + 1, 2, replace=False).tolist())
            low, high = bounds(start, stop)
            seen = np.flatnonzero(rows[start:stop].any(axis=0))
            assert (low, high) == (seen[0], seen[-1] + 1) if seen.size else low == high


@pytest.mark.parametrize("options", [{}, {"window": 100}])
def test_memory_is_linear_in_length(options):
    def gradients(q, k, v):
        return jax.grad(lambda *x: attention(*x, **options).sum(), argnums=(0, 1, 2))(q, k, v)

    def temporary(length):
        return temporary_bytes(
            gradients, *[jax.ShapeDtypeStruct((1, length, 2, 16), "float32")] * 3
        )

    # From where blocks have their full size; quadratic memory would grow 16 times.
    assert temporary(8192) < 4.2 * temporary(2048)


def test_under_jit_vmap_remat_and_scan(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, 40, 2, 4)), jnp.float32) for _ in range(3))

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, window=9)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    want = [
        np.stack(x) for x in zip(*(gradient(*x) for x in zip(q, k, v, strict=True)), strict=True)
    ]

    def layers(q, k, v):
        return jax.lax.scan(lambda total, x: (total + loss(*x), None), 0.0, (q, k, v))[0]

    got = {
        "vmap": jax.jit(jax.vmap(gradient))(q, k, v),
        "remat": jax.jit(jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1, 2))))(q, k, v),
        "scan": jax.jit(jax.grad(layers, argnums=(0, 1, 2)))(q, k, v),
    }
    for how, gradients in got.items():
        for x, y in zip(gradients, want, strict=True):
            assert relative_error(x, y) < 1e-6, how


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.ones((2, 5, 8), "f")}, r"q must be \[B, T, H, D\], not of shape \(2, 5, 8\)"),
        ({"q": np.ones((2, 5, 3, 4), "f")}, "3 heads, which is no multiple of the 2 heads of k"),
        ({"q": np.ones((1, 5, 4, 4), "f")}, "k has batch size 2 but q has 1"),
        ({"q": np.ones((2, 5, 4, 3), "f")}, "k has head_dim 4 but q has 3"),
        ({"q": np.ones((2, 5, 4, 4), "i")}, "q must be floating point, not int32"),
        ({"k": np.ones((2, 5, 2, 4), "float16")}, "k has dtype float16 but q has float32"),
        ({"v": np.ones((2, 6, 2, 4), "f")}, r"must agree in \[B, Tk, Hkv\]"),
        ({"q": np.ones((2, 0, 4, 4), "f")}, "q has an axis of size 0"),
        ({"window": 3, "causal": False}, "window=3 is defined for causal=True only"),
        ({"window": 0}, "window must be a positive int or None, not 0"),
        ({"logits_soft_cap": -1.0}, "logits_soft_cap must be positive or None, not -1.0"),
        ({"segment_ids": np.ones((2, 4), int)}, r"must be of shape \(2, 5\), not \(2, 4\)"),
        ({"segment_ids": np.ones((2, 5), "f")}, "must be integer, not float32"),
        ({"q": np.ones((2, 3, 4, 4), "f"), "segment_ids": np.ones((2, 5), int)}, "must be a pair"),
        ({"positions": np.ones((2, 5), int)}, "positions must be a pair"),
        (
            {"implementation": "fastest"},
            r"is unknown; on platform 'cpu' there is \['xla', 'reference', 'tpu_interpret', 'gpu_interpret', "
            r"'triton_interpret'\]",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "q": np.ones((2, 5, 4, 4), "f"),
        "k": np.ones((2, 5, 2, 4), "f"),
        "v": np.ones((2, 5, 2, 4), "f"),
    } | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize("order", [visits.by_queries, visits.by_keys])
def test_ranges_are_the_tiles_that_hold_something(rng, order):
    for _ in range(100):
        num_queries, num_keys = rng.integers(1, 40, 2).tolist()
        causal = rng.random() < 0.8
        window = int(rng.integers(1, 30)) if causal and rng.random() < 0.6 else None
        mask = Mask(num_queries, num_keys, causal, window, is_ordered=True)
        lengths = Blocks(*rng.integers(1, 9, 2).tolist())
        query, key = np.mgrid[:num_queries, : -(-num_keys // lengths.keys) * lengths.keys]
        keys = Tokens(np.where(key < num_keys, key, PADDING), None)
        allowed = mask.allowed(Tokens(query + mask.offset, None), keys)
        listed = order(mask, lengths, needs_mask=False)
        axis = "query"
        if order is visits.by_keys:
            allowed, lengths, axis = allowed.T, lengths[::-1], "key"
        table = visits.ranges(listed, axis)
        assert len(table) == -(-allowed.shape[0] // lengths[0])
        for block, (first, first_full, stop_full, stop) in enumerate(table):
            rows = allowed[block * lengths[0] :][: lengths[0]]
            for tile in range(-(-allowed.shape[1] // lengths[1])):
                part = rows[:, tile * lengths[1] :][:, : lengths[1]]
                assert (first <= tile < stop) == part.any()
                assert (first_full <= tile < stop_full) == part.all()


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("reference", "float32"),
        ("xla", "float32"),
        ("tpu_interpret", "float32"),
        pytest.param("gpu_interpret", "bfloat16", marks=pytest.mark.slow),
        pytest.param("triton_interpret", "float32", marks=[pytest.mark.slow, needs_triton]),
    ],
)
def test_gradients_of_parts_of_the_keys_add_up_to_those_of_all(rng, implementation, dtype):
    inputs, cotangents = random_inputs(rng, 1, 30, 50, 6, 3)
    q, k, v = (jnp.asarray(x, dtype) for x in inputs.values())
    cotangents = jnp.asarray(cotangents["out"], dtype), jnp.float32(cotangents["lse"])

    def gradients(implementation, arrays, known=None):
        """`(out, lse)`, and the gradients of q, k and v."""

        @jax.jit
        def run(arrays, known):
            def attend(q, k, v):
                tokens = Tokens(None, None), Tokens(None, None)
                options = {"causal": False, "window": None, "scale": 0.5, "logits_soft_cap": 3.0}
                return _attend(
                    q, k, v, *tokens, implementation=implementation, known=known, **options
                )

            found, pull = jax.vjp(attend, *arrays)
            return found, pull(cotangents)

        return run(arrays, known)

    known, want = gradients("xla", (q, k, v))
    parts = []
    for at in (slice(0, 16), slice(16, 50)):
        same, found = gradients(implementation, (q, k[:, at], v[:, at]), known)
        jax.tree.map(np.testing.assert_array_equal, same, known)
        parts.append(found)
    (dq, *d_keys), (dq_of_rest, *d_rest) = parts
    d_keys = (jnp.concatenate(x, axis=1) for x in zip(d_keys, d_rest, strict=True))
    for x, y in zip((dq + dq_of_rest, *d_keys), want, strict=True):
        assert relative_error(x, y) < TOLERANCE[dtype]
