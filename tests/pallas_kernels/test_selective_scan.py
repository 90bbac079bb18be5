"""selective_scan: the reference against NumPy's recurrence, then the fast forms against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import assert_close, relative_error, temporary_bytes
from scan_cases import positive_steps, random_segments, tokens_of, weighted_sum

from pallas_kernels import selective_scan, selective_scan_decode


def random_inputs(rng, batch, length, channels, states) -> dict[str, np.ndarray]:
    per_channel, per_state = (batch, length, channels), (batch, length, states)
    return {
        "u": rng.normal(size=per_channel),
        "delta": positive_steps(rng, per_channel),
        "A": -rng.uniform(0.2, 4, (channels, states)),
        "B": rng.normal(size=per_state),
        "C": rng.normal(size=per_state),
        "D": rng.normal(size=channels),
        "z": rng.normal(size=per_channel),
        "initial_state": rng.normal(size=(batch, channels, states)),
    }


def by_recurrence(inputs, segment_ids):
    u, delta, A, B, C, D, z, state = inputs.values()
    y, state = np.zeros(u.shape), state.copy()
    for row, ids in enumerate(segment_ids):
        for t, is_reset in tokens_of(ids):
            h = 0 if is_reset else np.exp(delta[row, t][:, None] * A) * state[row]
            state[row] = h + np.outer(delta[row, t] * u[row, t], B[row, t])
            gate = z[row, t] / (1 + np.exp(-z[row, t]))
            y[row, t] = (state[row] @ C[row, t] + D * u[row, t]) * gate
    return y, state


def in_float32(inputs):
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_recurrence(rng, implementation):
    inputs = random_inputs(rng, 3, 45, 5, 3)
    segment_ids = random_segments(rng, 3, 45)
    segment_ids[2] = 0
    got = selective_scan(
        **in_float32(inputs),
        segment_ids=segment_ids,
        return_state=True,
        implementation=implementation,
    )
    want = by_recurrence(inputs, segment_ids)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-5
    np.testing.assert_array_equal(got[1][2], in_float32(inputs)["initial_state"][2])


# Length, whether there are segments, which optional arrays there are.
CASES = {
    "less than a chunk": (7, False, ("D", "z")),
    "chunks": (75, False, ()),
    "chunks, a state and a skip": (64, False, ("D", "initial_state")),
    "chunks, segments, everything": (75, True, ("D", "z", "initial_state")),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES] + [("chunks, segments, everything", "bfloat16")],
)
def test_xla_with_every_gradient_equals_float64(rng, case, dtype):
    length, has_segments, optional = CASES[case]
    inputs = random_inputs(rng, 2, length, 24, 4)
    cotangents = {"y": rng.normal(size=(2, length, 24)), "state": rng.normal(size=(2, 24, 4))}
    for name in {"D", "z", "initial_state"} - set(optional):
        del inputs[name]
    segment_ids = random_segments(rng, 2, length) if has_segments else None

    def make_function(implementation):
        def function(**inputs):
            y, state = selective_scan(
                **inputs,
                segment_ids=segment_ids,
                return_state=True,
                implementation=implementation,
            )
            return {"y": y, "state": state}

        return function

    assert_close(make_function, inputs, cotangents, dtype)


def test_decoding_and_continuing_equal_the_whole(rng):
    inputs = in_float32(random_inputs(rng, 2, 24, 5, 4))
    state, A, D = (inputs.pop(name) for name in ("initial_state", "A", "D"))
    whole, last = selective_scan(**inputs, A=A, D=D, initial_state=state, return_state=True)

    ys = []
    for t in range(4):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        y, state = selective_scan_decode(state, **token, A=A, D=D)
        ys.append(y)
    middle = {name: x[:, 4:20] for name, x in inputs.items()}
    y, state = selective_scan(**middle, A=A, D=D, initial_state=state, return_state=True)
    ys.append(y)
    for t in range(20, 24):
        token = {name: x[:, t] for name, x in inputs.items()}
        y, state = selective_scan_decode(state, **token, A=A, D=D)
        ys.append(y[:, None])
    assert relative_error(jnp.concatenate(ys, axis=1), whole) < 1e-5
    assert relative_error(state, last) < 1e-5


def test_a_long_decay_underflows_to_zero_and_not_to_nan(rng):
    inputs = in_float32(random_inputs(rng, 1, 70, 3, 2))
    inputs["A"] *= 1e6

    def loss(inputs):
        y, state = selective_scan(**inputs, return_state=True)
        return jnp.sum(y) + jnp.sum(state), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    now = jnp.sum(inputs["B"] * inputs["C"], axis=-1, keepdims=True) * inputs["delta"]
    want = (now + inputs["D"]) * inputs["u"] * jax.nn.silu(inputs["z"])
    assert relative_error(y, want) < 1e-5
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), name


def test_padding_gives_zero_and_no_gradient(rng):
    inputs = in_float32(random_inputs(rng, 1, 12, 3, 2))
    segment_ids = jnp.asarray([[0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0]])
    padding = segment_ids[0] == 0

    def loss(inputs):
        y = selective_scan(**inputs, segment_ids=segment_ids)
        return weighted_sum(y), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    assert np.all(y[:, padding] == 0) and np.all(y[:, ~padding] != 0)
    for name in ("u", "delta", "B", "C", "z"):
        assert np.all(gradients[name][:, padding] == 0), name
        assert np.all(gradients[name][:, ~padding] != 0), name


def test_memory_is_linear_in_length_without_a_factor_of_the_states():
    channels, states = 32, 16

    def gradients(u, delta, A, B, C):
        return jax.grad(lambda *x: selective_scan(*x).sum(), argnums=(0, 1, 2, 3, 4))(
            u, delta, A, B, C
        )

    def temporary(length):
        shapes = [(1, length, channels)] * 2 + [(channels, states)] + [(1, length, states)] * 2
        return temporary_bytes(gradients, *[jax.ShapeDtypeStruct(x, "float32") for x in shapes])

    assert temporary(4096) < 4.2 * temporary(1024)
    # Ten arrays like u, where one [B, T, E, N] would be sixteen.
    assert temporary(4096) < 10 * 4096 * channels * 4


def test_under_jit_vmap_remat_and_scan(rng):
    layers = [in_float32(random_inputs(rng, 2, 40, 3, 2)) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def loss(inputs):
        return weighted_sum(selective_scan(**inputs))

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


VALID = {"u": ones(2, 5, 3), "delta": ones(2, 5, 3), "A": ones(3, 4)} | dict.fromkeys(
    ("B", "C"), ones(2, 5, 4)
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": ones(5, 3)}, r"u must be \[B, T, E\] = \[any, any, any\], not of shape \(5, 3\)"),
        ({"delta": ones(2, 4, 3)}, r"delta must be \[B, T, E\] = \[2, 5, 3\], not of shape"),
        ({"A": ones(2, 4)}, r"A must be \[E, N\] = \[3, any\], not of shape \(2, 4\)"),
        ({"B": ones(2, 5, 3)}, r"B must be \[B, T, N\] = \[2, 5, 4\], not of shape \(2, 5, 3\)"),
        ({"C": ones(2, 5, 4, dtype="float16")}, "C has dtype float16 but u has float32"),
        ({"D": ones(4)}, r"D must be \[E\] = \[3\], not of shape \(4,\)"),
        ({"z": ones(2, 5, 1)}, r"z must be \[B, T, E\] = \[2, 5, 3\]"),
        ({"delta": ones(2, 5, 3, dtype="int32")}, "delta must be floating point, not int32"),
        ({"u": ones(2, 0, 3)}, "u has an axis of size 0"),
        ({"segment_ids": np.ones((2, 4), int)}, r"must be of shape \(2, 5\), not \(2, 4\)"),
        ({"segment_ids": ones(2, 5)}, "segment_ids must be integer, not float32"),
        ({"initial_state": ones(2, 4, 3)}, r"the state must be \[B, E, N\] = \[2, 3, 4\]"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(VALID | change))


def test_bad_input_of_decoding_is_named():
    with pytest.raises(ValueError, match=r"u must be \[B, 1, E\] = \[any, 1, any\]"):
        selective_scan_decode(ones(2, 3, 4), **VALID)
    token = {name: x[:, 0] for name, x in VALID.items() if name != "A"} | {"A": VALID["A"]}
    with pytest.raises(ValueError, match=r"the state must be \[B, E, N\] = \[2, 3, 4\]"):
        selective_scan_decode(ones(2, 4, 4), **token)
