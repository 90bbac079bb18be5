"""Attention and SlidingWindow against attention written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import Attention, SlidingWindow

D_MODEL, ROWS, TIME = 16, 2, 11

MIXERS = {
    "multi_head": Attention(num_heads=4),
    "grouped_query": Attention(num_heads=4, num_kv_heads=2),
    "multi_query": Attention(num_heads=4, num_kv_heads=1, head_dim=6),
    "bidirectional": Attention(num_heads=2, causal=False),
    "no_positions": Attention(num_heads=2, rope_base=None),
    "qk_norm": Attention(num_heads=4, num_kv_heads=2, qk_norm=True, rope_base=500.0),
    "soft_cap": Attention(num_heads=2, logits_soft_cap=2.0),
    "window": SlidingWindow(num_heads=4, num_kv_heads=2, window=3),
    "window_of_itself": SlidingWindow(num_heads=2, window=1),
}


def turn(x, positions, base):
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def heads_of(mixer, params, name, count, x, positions):
    heads = (x @ params[name]["kernel"]).reshape(*x.shape[:2], count, -1)
    if name != "value" and mixer.qk_norm:
        rms = np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + 1e-6)
        heads = heads / rms * params[f"{name}_norm"]["scale"]
    rotates = name != "value" and mixer.rope_base is not None
    return turn(heads, positions, mixer.rope_base) if rotates else heads


def attention(mixer, params, x, positions, segment_ids):
    """One query at a time over the keys that it may see."""
    kv_heads = mixer.num_kv_heads or mixer.num_heads
    q = heads_of(mixer, params, "query", mixer.num_heads, x, positions)
    k = heads_of(mixer, params, "key", kv_heads, x, positions)
    v = heads_of(mixer, params, "value", kv_heads, x, positions)
    y = np.zeros(q.shape[:3] + v.shape[3:])
    for b, t, h in np.ndindex(*q.shape[:3]):
        sees = [
            s
            for s in range(x.shape[1])
            if segment_ids[b, s] == segment_ids[b, t] != 0
            and (s <= t or not mixer.causal)
            and (mixer.window is None or t - s < mixer.window)
        ]
        if sees:
            shared = h // (mixer.num_heads // kv_heads)
            logits = k[b, sees, shared] @ q[b, t, h] / np.sqrt(q.shape[-1])
            if mixer.logits_soft_cap is not None:
                logits = mixer.logits_soft_cap * np.tanh(logits / mixer.logits_soft_cap)
            weights = np.exp(logits - logits.max())
            y[b, t, h] = weights @ v[b, sees, shared] / weights.sum()
    return y.reshape(*x.shape[:2], -1) @ params["out"]["kernel"]


def random_params(mixer, rng):
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), *batch_of_zeros(), **keywords())
    normal = lambda p: np.float32(rng.normal(size=p.shape) / np.sqrt(p.shape[0]))  # noqa: E731
    return jax.tree.map(normal, shapes["params"])


def batch_of_zeros():
    return (jnp.zeros((ROWS, TIME, D_MODEL)),)


def keywords(positions=None, segment_ids=None):
    arrays = {"positions": positions, "segment_ids": segment_ids}
    return {
        k: jnp.ones((ROWS, TIME), jnp.int32) if v is None else jnp.asarray(v)
        for k, v in arrays.items()
    }


@pytest.mark.parametrize("name", MIXERS)
def test_parallel_form_with_packed_segments_and_padding(rng, name):
    mixer = MIXERS[name]
    params = random_params(mixer, rng)
    x = 2 * rng.normal(size=(ROWS, TIME, D_MODEL))
    segment_ids = np.array([[1] * 5 + [2] * 6, [1] * 3 + [2] * 4 + [3] + [0] * 3])
    positions = np.array([[*range(5), *range(6)], [*range(3), *range(4), 0, 0, 0, 0]])
    apply = jax.jit(
        lambda x: mixer.apply({"params": params}, x, **keywords(positions, segment_ids))
    )
    y, state = apply(jnp.float32(x))
    expected = attention(mixer, jax.tree.map(np.float64, params), x, positions, segment_ids)
    real = segment_ids > 0
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(state.length, real.sum(axis=1))


def test_flops_count_the_keys_that_are_seen(rng):
    context = int(rng.integers(5, 40))
    for mixer in (Attention(num_heads=4, num_kv_heads=2), SlidingWindow(num_heads=4, window=7)):
        kv_heads = mixer.num_kv_heads or 4
        seen = sum(min(t + 1, mixer.window or context) for t in range(context)) / context
        multiply_adds = 16 * 4 * 4 * 2 + 16 * 4 * kv_heads * 2 + seen * 4 * 4 * 2
        np.testing.assert_allclose(mixer.flops_per_token(16, context), 2 * multiply_adds)
        reading = multiply_adds - 16 * 4 * kv_heads * 2
        flops = mixer.flops_per_token(16, context, reads_only=True)
        np.testing.assert_allclose(flops, 2 * reading)
    assert Attention(causal=False).mean_keys(context) == context


def test_state_has_a_slot_for_every_token_or_for_the_window():
    assert Attention(num_heads=4, num_kv_heads=2).init_state(3, 20, 32).k.shape == (3, 20, 2, 8)
    assert SlidingWindow(num_heads=4, window=6).init_state(3, 20, 32).k.shape == (3, 6, 4, 8)
    assert SlidingWindow(num_heads=4, window=60).init_state(3, 20, 32).k.shape == (3, 20, 4, 8)
    assert Attention().init_state(1, 2, 16, "bfloat16").v.dtype == jnp.bfloat16


def test_frozen_state_is_read_and_never_written(rng):
    """Recursive KV sharing: later tokens query the keys and values of an earlier recursion."""
    mixer = Attention(num_heads=4, num_kv_heads=2)
    params = random_params(mixer, rng)
    exact = jax.tree.map(np.float64, params)
    x, later = rng.normal(size=(2, ROWS, TIME, D_MODEL))
    ones = np.ones((ROWS, TIME), int)
    positions = ones * np.arange(TIME)
    variables, arguments = {"params": params}, keywords(positions, ones)
    _, state = mixer.apply(variables, jnp.float32(x), **arguments)
    y, after = mixer.apply(variables, jnp.float32(later), **arguments, state=state.freeze())
    assert after.frozen
    jax.tree.map(np.testing.assert_array_equal, state.freeze(), after)
    # With the queries of `later` on the keys and values of `x`, by hand for one row and head.
    q = heads_of(mixer, exact, "query", 4, later, positions)
    k, v = (heads_of(mixer, exact, name, 2, x, positions) for name in ("key", "value"))
    mixed = np.zeros((ROWS, TIME, 4, 4))
    for b, t, h in np.ndindex(ROWS, TIME, 4):
        weights = np.exp(k[b, : t + 1, h // 2] @ q[b, t, h] / 2)
        mixed[b, t, h] = weights @ v[b, : t + 1, h // 2] / weights.sum()
    expected = mixed.reshape(ROWS, TIME, 16) @ exact["out"]["kernel"]
    np.testing.assert_allclose(y, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (Attention(num_heads=4, num_kv_heads=3), "num_kv_heads=3 must divide num_heads=4"),
        (Attention(num_heads=3), "num_heads=3 must divide d_model=16"),
    ],
)
def test_heads_that_do_not_divide_are_an_error(mixer, message):
    with pytest.raises(ValueError, match=message):
        mixer.init(jax.random.key(0), *batch_of_zeros(), **keywords())
