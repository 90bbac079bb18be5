"""Decoding with a state gives what the parallel form gives, for every mixer.

The parallel form is held against NumPy in the other files of this folder. Here all calls have 3 rows and 12, 5 or 1
tokens, so that each mixer compiles four times and no more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import Attention, Mamba, Mamba2, ShortConv, SlidingWindow, TaylorLinear

D_MODEL, ROWS, LENGTH, PIECE = 8, 3, 12, 5
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

CACHES = {
    "attention": Attention(num_heads=4, num_kv_heads=2, qk_norm=True, logits_soft_cap=5.0),
    "sliding_window": SlidingWindow(num_heads=2, num_kv_heads=1, window=4),
}
RECURRENT = {
    "short_conv": ShortConv(),
    "short_conv_wide": ShortConv(width=7, expansion=1),
    "taylor_linear": TaylorLinear(num_heads=2, feature_dim=4, chunk_size=5, rope_base=100.0),
    "mamba": Mamba(state_dim=3),
    "mamba2": Mamba2(head_dim=4, state_dim=3, num_groups=2),
}
MIXERS = CACHES | RECURRENT


@functools.partial(jax.jit, static_argnums=0)
def apply(mixer, variables, x, positions, segment_ids, state):
    return mixer.apply(variables, x, positions=positions, segment_ids=segment_ids, state=state)


class Decoder:
    """A mixer with random parameters, run in parallel or appended to."""

    def __init__(self, name, rng):
        self.mixer = MIXERS[name]
        zeros, ones = jnp.zeros((1, 1, D_MODEL)), jnp.ones((1, 1), jnp.int32)
        shapes = jax.eval_shape(
            self.mixer.init, jax.random.key(0), zeros, positions=ones, segment_ids=ones
        )
        draw = lambda p: np.float32(rng.normal(size=p.shape) / np.sqrt(p.shape[0]))  # noqa: E731
        self.variables = jax.tree.map(draw, shapes)
        self.empty = self.mixer.init_state(ROWS, LENGTH, D_MODEL)

    def __call__(self, x, segment_ids=1, state=None, start=0):
        """Runs tokens whose positions go on from `start` (int or [B]) in the order of those that are not padding."""
        segment_ids = np.broadcast_to(np.int32(segment_ids), x.shape[:2])
        positions = np.broadcast_to(start, ROWS)[:, None] + np.cumsum(segment_ids > 0, axis=1) - 1
        positions = np.int32(np.maximum(positions, 0))
        y, state = apply(self.mixer, self.variables, np.float32(x), positions, segment_ids, state)
        return np.asarray(y), state


@pytest.fixture(params=MIXERS)
def decoder(request, rng):
    return Decoder(request.param, rng)


@pytest.fixture
def x(rng):
    return rng.normal(size=(ROWS, LENGTH, D_MODEL))


def test_one_or_more_tokens_at_a_time(decoder, x):
    expected, _ = decoder(x)
    state, outputs, begin = decoder.empty, [], 0
    form = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)  # noqa: E731
    for size in (
        PIECE,
        1,
        PIECE,
        1,
    ):  # a ring of 4 slots wraps round within a piece and between pieces
        y, state = decoder(x[:, begin : begin + size], state=state, start=begin)
        assert form(state) == form(decoder.empty)
        outputs.append(y)
        begin += size
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts(decoder, x, side):
    """Prompts of 5, 2 and 0 tokens, padded on either side, then one token a step for all."""
    lengths, steps = np.array([5, 2, 0]), 4
    slots = np.arange(PIECE)
    is_text = slots < lengths[:, None] if side == "right" else slots >= PIECE - lengths[:, None]
    prompts = np.zeros((ROWS, PIECE, D_MODEL))
    for b, length in enumerate(lengths):
        prompts[b, is_text[b]] = x[b, :length]
    y, state = decoder(prompts, is_text, decoder.empty)
    outputs = [y[b][is_text[b]] for b in range(ROWS)]
    for step in range(steps):
        token = x[np.arange(ROWS), lengths + step][:, None]
        y, state = decoder(token, state=state, start=lengths + step)
        outputs = [np.concatenate([done, new]) for done, new in zip(outputs, y, strict=True)]
    expected, _ = decoder(x)  # causal, so a row's first tokens do not depend on the rest
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(outputs[b], expected[b, : length + steps], **TOLERANCE)


@pytest.mark.parametrize("time", [1, PIECE])
def test_padding_leaves_the_state_untouched(decoder, x, time):
    _, before = decoder(x[:, :PIECE], state=decoder.empty)
    _, after = decoder(x[:, -time:], [[0], [1], [0]], before, start=PIECE)
    for b, changes in enumerate([False, True, False]):
        same = jax.tree.map(lambda old, new, b=b: (old[b] == new[b]).all(), before, after)
        assert all(jax.tree.leaves(same)) != changes


def test_padding_between_appended_tokens_is_left_out(decoder, x, rng):
    expected, _ = decoder(x)
    y_first, state = decoder(x[:, :PIECE], state=decoder.empty)
    is_text = np.array([0, 1, 0, 1, 1]) > 0
    spread = rng.normal(size=(ROWS, PIECE, D_MODEL))
    spread[:, is_text] = x[:, 5:8]
    y, state = decoder(spread, is_text, state, start=5)
    y_last, _ = decoder(x[:, 8:9], state=state, start=8)
    outputs = np.concatenate([y_first, y[:, is_text], y_last], axis=1)
    np.testing.assert_allclose(outputs, expected[:, :9], **TOLERANCE)


@pytest.mark.parametrize("time", [1, PIECE])
def test_a_new_segment_starts_from_nothing(decoder, x, time):
    """Rows of segments 1, 1 and 1 then 2; the tokens after them are of segment 2 in all but the first row."""
    _, state = decoder(x[:, :PIECE], [[1] * 5, [1] * 5, [1, 1, 2, 2, 2]], decoder.empty)
    new = x[:, PIECE : PIECE + time]
    y, _ = decoder(new, [[1], [2], [2]], state, start=[5, 0, 5])
    going_on, _ = decoder(x)
    np.testing.assert_allclose(y[0], going_on[0, PIECE : PIECE + time], **TOLERANCE)
    starting, _ = decoder(np.roll(x, -PIECE, axis=1))
    np.testing.assert_allclose(y[1], starting[1, :time], **TOLERANCE)
    # Positions enter by their differences only, so they may as well start from 0 here.
    third, _ = decoder(np.roll(x, -2, axis=1))
    np.testing.assert_allclose(y[2], third[2, 3 : 3 + time], **TOLERANCE)


@pytest.mark.parametrize("name", MIXERS)
def test_the_state_of_the_parallel_form_goes_on(rng, x, name):
    """A recurrent state does so as it is; a cache is first appended to an empty one, which has room."""
    decoder = Decoder(name, rng)
    expected, _ = decoder(x)
    for length in (PIECE, 2):  # without and with padding behind the prompt
        _, state = decoder(x[:, :PIECE], np.arange(PIECE) < length)
        state = decoder.empty.append(state) if name in CACHES else state
        y, _ = decoder(x[:, length : length + PIECE], state=state, start=length)
        np.testing.assert_allclose(y, expected[:, length : length + PIECE], **TOLERANCE)


@pytest.mark.parametrize("name", CACHES)
def test_positions_may_skip_tokens_that_went_elsewhere(rng, x, name):
    """As those do that a depth policy leaves out: a window is of the tokens that came, in one call or in several."""
    decoder = Decoder(name, rng)
    positions = np.int32(np.cumsum(rng.integers(1, 4, size=(ROWS, LENGTH)), axis=1))
    ones, x = np.ones_like(positions), np.float32(x)
    expected, _ = apply(decoder.mixer, decoder.variables, x, positions, ones, None)
    state, outputs = decoder.empty, []
    for begin, end in ((0, 5), (5, 10), (10, 11), (11, 12)):
        call = slice(None), slice(begin, end)
        y, state = apply(
            decoder.mixer, decoder.variables, x[call], positions[call], ones[call], state
        )
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, **TOLERANCE)
