"""ssd_scan: the reference against NumPy's recurrence, then the fast forms against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import assert_close, relative_error, temporary_bytes
from scan_cases import positive_steps, random_segments, tokens_of, weighted_sum

from pallas_kernels import ssd_decode, ssd_scan


def random_inputs(rng, batch, length, heads, dim, groups, states) -> dict[str, np.ndarray]:
    return {
        "x": rng.normal(size=(batch, length, heads, dim)),
        "dt": positive_steps(rng, (batch, length, heads)),
        "A": -rng.uniform(0.2, 2, heads),
        "B": rng.normal(size=(batch, length, groups, states)),
        "C": rng.normal(size=(batch, length, groups, states)),
        "D": rng.normal(size=heads),
        "initial_state": rng.normal(size=(batch, heads, dim, states)),
    }


def by_recurrence(inputs, segment_ids):
    x, dt, A, B, C, D, state = inputs.values()
    y, state = np.zeros(x.shape), state.copy()
    for row, ids in enumerate(segment_ids):
        for t, is_reset in tokens_of(ids):
            for head in range(x.shape[2]):
                group = head * B.shape[2] // x.shape[2]
                h = 0 if is_reset else np.exp(dt[row, t, head] * A[head]) * state[row, head]
                h = h + dt[row, t, head] * np.outer(x[row, t, head], B[row, t, group])
                y[row, t, head] = h @ C[row, t, group] + D[head] * x[row, t, head]
                state[row, head] = h
    return y, state


def in_float32(inputs):
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_recurrence(rng, implementation, groups):
    inputs = random_inputs(rng, 3, 21, 4, 3, groups, 5)
    segment_ids = random_segments(rng, 3, 21)
    segment_ids[2] = 0
    got = ssd_scan(
        **in_float32(inputs),
        segment_ids=segment_ids,
        return_state=True,
        chunk_size=8,
        implementation=implementation,
    )
    want = by_recurrence(inputs, segment_ids)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-5
    np.testing.assert_array_equal(got[1][2], in_float32(inputs)["initial_state"][2])


# The gradients of A and D are sums over tokens, a number a head, in which a few heads may all but cancel by chance.
NUM_HEADS = 32
OUTPUTS_ARE_LIKE = {"y": "x", "state": "initial_state"}

# Length, chunk, groups, whether there are segments, which optional arrays there are.
CASES = {
    "one chunk": (33, None, 1, False, ()),
    "one chunk, segments": (33, 64, 2, True, ("D",)),
    "chunks": (75, 16, 1, False, ("D", "initial_state")),
    "chunks, segments, everything": (75, 16, 2, True, ("D", "initial_state")),
    "automatic chunks": (150, None, 4, True, ()),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES] + [("chunks, segments, everything", "bfloat16")],
)
def test_xla_with_every_gradient_equals_float64(rng, case, dtype):
    length, chunk_size, groups, has_segments, optional = CASES[case]
    inputs = random_inputs(rng, 2, length, NUM_HEADS, 5, groups, 6)
    cotangents = {name: rng.normal(size=inputs[of].shape) for name, of in OUTPUTS_ARE_LIKE.items()}
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

    assert_close(make_function, inputs, cotangents, dtype)


def test_decoding_and_continuing_equal_the_whole(rng):
    inputs = in_float32(random_inputs(rng, 2, 24, 4, 5, 2, 3))
    state, A, D = (inputs.pop(name) for name in ("initial_state", "A", "D"))
    whole, last = ssd_scan(**inputs, A=A, D=D, initial_state=state, return_state=True)

    ys = []
    for t in range(4):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        y, state = ssd_decode(state, **token, A=A, D=D)
        ys.append(y)
    middle = {name: x[:, 4:20] for name, x in inputs.items()}
    y, state = ssd_scan(**middle, A=A, D=D, initial_state=state, return_state=True, chunk_size=8)
    ys.append(y)
    for t in range(20, 24):
        token = {name: x[:, t] for name, x in inputs.items()}
        y, state = ssd_decode(state, **token, A=A, D=D)
        ys.append(y[:, None])
    assert relative_error(jnp.concatenate(ys, axis=1), whole) < 1e-5
    assert relative_error(state, last) < 1e-5


def test_a_long_decay_underflows_to_zero_and_not_to_nan(rng):
    inputs = in_float32(random_inputs(rng, 1, 40, 2, 3, 1, 4))
    inputs["A"] *= 1e5

    def loss(inputs):
        y, state = ssd_scan(**inputs, return_state=True, chunk_size=16)
        return jnp.sum(y) + jnp.sum(state), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    now = jnp.sum(inputs["B"] * inputs["C"], axis=-1) * inputs["dt"]  # one group: [B, T, 1]
    assert relative_error(y, (now + inputs["D"])[..., None] * inputs["x"]) < 1e-5
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), name


def test_padding_gives_zero_and_no_gradient(rng):
    inputs = in_float32(random_inputs(rng, 1, 12, 2, 3, 1, 4))
    segment_ids = jnp.asarray([[0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0]])
    padding = segment_ids[0] == 0

    def loss(inputs):
        y = ssd_scan(**inputs, segment_ids=segment_ids, chunk_size=4)
        return weighted_sum(y), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    assert np.all(y[:, padding] == 0) and np.all(y[:, ~padding] != 0)
    for name in ("x", "dt", "B", "C"):
        assert np.all(gradients[name][:, padding] == 0), name
        assert np.all(gradients[name][:, ~padding] != 0), name


def test_memory_is_linear_in_length():
    def gradients(x, dt, A, B, C):
        return jax.grad(lambda *x: ssd_scan(*x).sum(), argnums=(0, 1, 2, 3, 4))(x, dt, A, B, C)

    def temporary(length):
        shapes = [(1, length, 4, 8), (1, length, 4), (4,), (1, length, 1, 16), (1, length, 1, 16)]
        return temporary_bytes(gradients, *[jax.ShapeDtypeStruct(x, "float32") for x in shapes])

    # Both lengths are many chunks; quadratic memory would grow 16 times.
    assert temporary(4096) < 4.2 * temporary(1024)


def test_under_jit_vmap_remat_and_scan(rng):
    layers = [in_float32(random_inputs(rng, 2, 20, 2, 3, 1, 4)) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def loss(inputs):
        return weighted_sum(ssd_scan(**inputs, chunk_size=8))

    def in_a_scan(inputs):
        return jax.lax.scan(lambda total, x: (total + loss(x), None), 0.0, inputs)[0]

    gradient = jax.jit(jax.grad(loss))
    want = jax.tree.map(lambda *x: jnp.stack(x), *map(gradient, layers))
    got = {
        "vmap": jax.jit(jax.vmap(gradient))(stacked),
        "remat": jax.jit(jax.vmap(jax.grad(jax.remat(loss))))(stacked),
        "scan": jax.jit(jax.grad(in_a_scan))(stacked),
    }
    for how, gradients in got.items():
        for name in want:
            assert relative_error(gradients[name], want[name]) < 1e-5, (how, name)


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


VALID = {"x": ones(2, 5, 4, 3), "dt": ones(2, 5, 4), "A": ones(4)} | dict.fromkeys(
    ("B", "C"), ones(2, 5, 2, 6)
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ones(5, 4, 3)}, r"x must be \[B, T, H, P\] = .*, not of shape \(5, 4, 3\)"),
        ({"dt": ones(2, 5, 3)}, r"dt must be \[B, T, H\] = \[2, 5, 4\], not of shape \(2, 5, 3\)"),
        ({"A": ones(4, 1)}, r"A must be \[H\] = \[4\], not of shape \(4, 1\)"),
        ({"B": ones(2, 5, 3, 6)}, "B has 3 groups; valid: a divisor of x's 4 heads"),
        ({"C": ones(2, 5, 2, 5)}, r"C must be \[B, T, G, N\] = \[2, 5, 2, 6\]"),
        ({"C": ones(2, 5, 2, 6, dtype="float16")}, "C has dtype float16 but x has float32"),
        ({"D": ones(3)}, r"D must be \[H\] = \[4\], not of shape \(3,\)"),
        ({"dt": ones(2, 5, 4, dtype="int32")}, "dt must be floating point, not int32"),
        ({"x": ones(2, 0, 4, 3)}, "x has an axis of size 0"),
        ({"chunk_size": 0}, "chunk_size must be a positive int or None, not 0"),
        ({"segment_ids": np.ones((2, 4), int)}, r"must be of shape \(2, 5\), not \(2, 4\)"),
        ({"segment_ids": ones(2, 5)}, "segment_ids must be integer, not float32"),
        ({"initial_state": ones(2, 4, 6, 3)}, r"the state must be \[B, H, P, N\] = \[2, 4, 3, 6\]"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ssd_scan(**(VALID | change))


def test_bad_input_of_decoding_is_named():
    with pytest.raises(ValueError, match=r"x must be \[B, 1, H, P\] = \[any, 1, any, any\]"):
        ssd_decode(ones(2, 4, 3, 6), **VALID)
    token = {name: x[:, 0] for name, x in VALID.items() if name != "A"} | {"A": VALID["A"]}
    with pytest.raises(ValueError, match=r"the state must be \[B, H, P, N\] = \[2, 4, 3, 6\]"):
        ssd_decode(ones(2, 4, 6, 3), **token)
