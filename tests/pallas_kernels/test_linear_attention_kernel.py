"""linear_attention: against NumPy's recurrence, then the fast form against the reference in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import assert_close, relative_error, temporary_bytes

from pallas_kernels import LinearAttentionState, linear_attention, linear_attention_decode
from pallas_kernels.linear_attention import FEATURE_MAPS


def taylor(x):
    """The map of the paper, one feature for each ordered pair."""
    dim = len(x)
    return np.concatenate([[1], x / dim**0.25, np.outer(x, x).ravel() / math.sqrt(2 * dim)])


NUMPY_MAPS = {
    "taylor": taylor,
    "identity": lambda x: x,
    "elu+1": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
}


def by_recurrence(q, k, v, feature_map, segment_ids, normalize):
    """One token at a time; a new segment empties the state."""
    phi = NUMPY_MAPS[feature_map]
    out = np.zeros(v.shape)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        state, total, segment = 0, 0, 0
        for t in range(q.shape[1]):
            if segment_ids[b, t] == 0:
                continue
            if segment_ids[b, t] != segment:
                state, total, segment = 0, 0, segment_ids[b, t]
            state = state + np.outer(phi(k[b, t, h]), v[b, t, h])
            total = total + phi(k[b, t, h])
            weights = phi(q[b, t, h])
            out[b, t, h] = weights @ state / (weights @ total if normalize else 1)
    return out


def random_segments(rng, batch, length):
    """Segments in order, with padding between and inside."""
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    return (segments * (rng.random((batch, length)) > 0.2)).astype(np.int32)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("feature_map", list(FEATURE_MAPS))
def test_equals_the_recurrence(rng, implementation, feature_map):
    q, k = rng.normal(size=(2, 2, 13, 2, 4))
    v = rng.normal(size=(2, 13, 2, 3))
    segment_ids = random_segments(rng, 2, 13)
    normalize = feature_map != "identity"  # whose sum of weights can be 0
    got = linear_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        feature_map=feature_map,
        chunk_size=5,
        segment_ids=segment_ids,
        normalize=normalize,
        implementation=implementation,
    )
    want = by_recurrence(q, k, v, feature_map, segment_ids, normalize)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_the_taylor_map_has_half_the_pairs_and_the_same_products(rng, dim):
    x, y = rng.normal(size=(2, dim))
    expand = FEATURE_MAPS["taylor"].expand
    with jax.enable_x64(True):
        features = [np.asarray(expand(jnp.asarray(z)[:, None])[:, 0]) for z in (x, y)]
        similarity = FEATURE_MAPS["taylor"].similarity(jnp.asarray(x)[None], jnp.asarray(y)[None])
    assert len(features[0]) == 1 + dim + dim * (dim + 1) // 2
    assert len(features[0]) == FEATURE_MAPS["taylor"].num_features(dim)
    logit = x @ y / math.sqrt(dim)
    np.testing.assert_allclose(features[0] @ features[1], 1 + logit + logit**2 / 2, rtol=1e-12)
    np.testing.assert_allclose(similarity[0, 0], 1 + logit + logit**2 / 2, rtol=1e-12)


# Length, chunk, whether there are segments, whether a state comes in.
CASES = {
    "one chunk": (137, None, False, False),
    "one chunk, segments": (150, None, True, False),
    "chunks": (101, 16, False, False),
    "chunks, segments and a state": (101, 16, True, True),
    "automatic chunks": (700, None, True, False),
    "one chunk and a state": (33, 64, False, True),
}
SLOW = ("one chunk", "chunks")  # what segments and a state add to


@pytest.mark.parametrize(
    ("case", "feature_map", "dtype"),
    [
        pytest.param(case, "taylor", "float32", marks=[pytest.mark.slow] if case in SLOW else [])
        for case in CASES
    ]
    + [("chunks, segments and a state", "elu+1", "float32")]
    + [pytest.param("chunks, segments and a state", "softplus", "float32", marks=pytest.mark.slow)]
    + [("one chunk, segments", "taylor", "bfloat16")]
    + [pytest.param("chunks", "taylor", "bfloat16", marks=pytest.mark.slow)],
)
def test_xla_with_every_gradient_equals_float64(rng, case, feature_map, dtype):
    length, chunk_size, has_segments, has_state = CASES[case]
    batch, heads, dim, value_dim = 2, 2, 6, 5
    features = FEATURE_MAPS[feature_map].num_features(dim)
    state = {
        "kv": rng.normal(size=(batch, heads, features, value_dim)),
        "k_sum": rng.uniform(size=(batch, heads, features)),
    }
    if feature_map == "taylor":
        state["k_sum"][..., 1:] = 0  # a sum that some keys could have: all weights stay positive
    inputs = {
        "q": rng.normal(size=(batch, length, heads, dim)),
        "k": rng.normal(size=(batch, length, heads, dim)),
        "v": rng.normal(size=(batch, length, heads, value_dim)),
    }
    cotangents = {"out": rng.normal(size=inputs["v"].shape)}
    cotangents |= {name: rng.normal(size=x.shape) for name, x in state.items()}
    if has_state:
        inputs |= state
    segment_ids = random_segments(rng, batch, length) if has_segments else None

    def make_function(implementation):
        def function(q, k, v, **state):
            out, state = linear_attention(
                q,
                k,
                v,
                feature_map=feature_map,
                chunk_size=chunk_size,
                segment_ids=segment_ids,
                initial_state=LinearAttentionState(**state) if state else None,
                return_state=True,
                implementation=implementation,
            )
            return {"out": out, "kv": state.kv, "k_sum": state.k_sum}

        return function

    assert_close(make_function, inputs, cotangents, dtype)


@pytest.mark.parametrize("feature_map", ["taylor", "elu+1"])
def test_decoding_and_continuing_equal_the_whole(rng, feature_map):
    q, k = (jnp.asarray(rng.normal(size=(2, 24, 3, 4)), jnp.float32) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(2, 24, 3, 5)), jnp.float32)
    whole, last = linear_attention(q, k, v, feature_map=feature_map, return_state=True)

    state = LinearAttentionState.zeros(2, 3, 4, 5, feature_map)
    outs = []
    for t in range(4):
        token = (x[:, t : t + 1] for x in (q, k, v))
        out, state = linear_attention_decode(state, *token, feature_map=feature_map)
        outs.append(out)
    out, state = linear_attention(
        *(x[:, 4:20] for x in (q, k, v)),
        feature_map=feature_map,
        chunk_size=8,
        initial_state=state,
        return_state=True,
    )
    outs.append(out)
    for t in range(20, 24):
        token = (x[:, t] for x in (q, k, v))
        out, state = linear_attention_decode(state, *token, feature_map=feature_map)
        outs.append(out[:, None])
    assert relative_error(jnp.concatenate(outs, axis=1), whole) < 1e-5
    assert relative_error(state.kv, last.kv) < 1e-5
    assert relative_error(state.k_sum, last.k_sum) < 1e-5


def test_padding_gives_zero_and_finite_gradients(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 12, 1, 4)), jnp.float32) for _ in range(3))
    segment_ids = jnp.asarray([[0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0]])
    padding = segment_ids[0] == 0

    def loss(q, k, v):
        out = linear_attention(q, k, v, segment_ids=segment_ids, chunk_size=4)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.all(out[:, padding] == 0) and np.all(out[:, ~padding] != 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[:, padding] == 0)


def test_memory_is_linear_in_length():
    def gradients(q, k, v):
        return jax.grad(lambda *x: linear_attention(*x).sum(), argnums=(0, 1, 2))(q, k, v)

    def temporary(length):
        return temporary_bytes(gradients, *[jax.ShapeDtypeStruct((1, length, 2, 8), "float32")] * 3)

    # Both lengths are several chunks; quadratic memory would grow 16 times.
    assert temporary(8192) < 4.2 * temporary(2048)


def test_under_jit_vmap_remat_and_scan(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, 20, 2, 4)), jnp.float32) for _ in range(3))

    def loss(q, k, v):
        return jnp.sum(jnp.sin(linear_attention(q, k, v, chunk_size=8)))

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
            assert relative_error(x, y) < 1e-5, how


ONES = np.ones((2, 5, 3, 4), "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ONES[0]}, r"q must be \[B, T, H, D\], not of shape \(5, 3, 4\)"),
        ({"k": ONES[:, :4]}, r"k must be of q's shape \(2, 5, 3, 4\), not \(2, 4, 3, 4\)"),
        ({"v": ONES[:, :, :2]}, "must agree with q"),
        ({"v": ONES.astype("float16")}, "v has dtype float16 but q has float32"),
        ({"q": ONES.astype(int)}, "q must be floating point"),
        ({"q": ONES[:, :0]}, "q has an axis of size 0"),
        ({"feature_map": "tailor"}, r"one of \['elu\+1', 'identity', 'softplus', 'taylor'\]"),
        ({"chunk_size": 0}, "chunk_size must be a positive int or None, not 0"),
        ({"eps": 0.0}, "eps must be positive, not 0.0"),
        ({"segment_ids": np.ones((2, 4), int)}, r"must be of shape \(2, 5\), not \(2, 4\)"),
        ({"segment_ids": np.ones((2, 5), "f")}, "must be integer, not float32"),
        (
            {"initial_state": LinearAttentionState.zeros(2, 3, 4, 5)},
            r"must have kv \(2, 3, 15, 4\) and k_sum \(2, 3, 15\), not \(2, 3, 15, 5\)",
        ),
        ({"implementation": "tpu"}, r"implementation='tpu' runs on \['tpu'\] only"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"q": ONES, "k": ONES, "v": ONES} | change))


def test_bad_input_of_decoding_is_named():
    state = LinearAttentionState.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="q must hold one token, not 5"):
        linear_attention_decode(state, ONES, ONES, ONES)
    with pytest.raises(ValueError, match="the state must have kv"):
        linear_attention_decode(state, ONES[:1, 0], ONES[:1, 0], ONES[:1, 0])
