"""A state that can forget tokens is that of a text which never had them, for every mixer.

Calls of four tokens, of which any number stay: what each call gives is held against the parallel form over the tokens
that have stayed so far and those of the call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import (
    Attention,
    Mamba,
    Mamba2,
    ShortConv,
    SlidingWindow,
    TaylorLinear,
    Tentative,
)
from effjax.mixers.tentative import make_tentative, settle

D_MODEL, ROWS, TOKENS, CALLS = 8, 4, 4, 6
LENGTH = TOKENS * CALLS
MIXERS = {
    "attention": Attention(num_heads=2, num_kv_heads=1),
    "ring": SlidingWindow(num_heads=2, window=3),
    "short_conv": ShortConv(),
    "taylor_linear": TaylorLinear(num_heads=2, feature_dim=4),
    "mamba": Mamba(state_dim=3),
    "mamba2": Mamba2(head_dim=4, state_dim=3, num_groups=2),
}
# One that overwrites, and one that convolves and adds up.
SHORT = ("ring", "mamba")


@functools.partial(jax.jit, static_argnums=0)
def parallel(mixer, variables, x, lengths):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    return mixer.apply(variables, x, positions=positions, segment_ids=segment_ids)[0]


@functools.partial(jax.jit, static_argnums=0)
def call(mixer, variables, x, num_read, state, length):
    """Reads the first `num_read` tokens of x behind the `length` that have stayed."""
    state = settle(state, length)
    positions = length[:, None] + jnp.arange(TOKENS)
    segment_ids = (jnp.arange(TOKENS) < num_read[:, None]).astype(jnp.int32)
    return mixer.apply(variables, x, positions=positions, segment_ids=segment_ids, state=state)


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS],
)
def test_forgotten_tokens_leave_no_trace(name, rng):
    mixer = MIXERS[name]
    tentative = Tentative(mixer, TOKENS)
    zeros, ones = jnp.zeros((1, 1, D_MODEL)), jnp.ones((1, 1), jnp.int32)
    shapes = [
        jax.eval_shape(m.init, jax.random.key(0), zeros, positions=ones, segment_ids=ones)
        for m in (mixer, tentative)
    ]
    assert shapes[0] == shapes[1]
    draw = lambda p: np.float32(rng.normal(size=p.shape) / np.sqrt(p.shape[0]))  # noqa: E731
    variables = jax.tree.map(draw, shapes[0])

    state = make_tentative(
        mixer.init_state(ROWS, LENGTH, D_MODEL), tentative.init_state(ROWS, LENGTH, D_MODEL)
    )
    text, length = np.zeros((ROWS, LENGTH, D_MODEL), np.float32), np.zeros(ROWS, np.int32)
    rows = np.arange(ROWS)
    for _ in range(CALLS):
        x = rng.normal(size=(ROWS, TOKENS, D_MODEL)).astype(np.float32)
        num_read = rng.integers(TOKENS + 1, size=ROWS, dtype=np.int32)
        y, state = call(tentative, variables, x, num_read, state, length)
        for b in rows:
            text[b, length[b] : length[b] + num_read[b]] = x[b, : num_read[b]]
        want = np.asarray(parallel(mixer, variables, text, length + num_read))
        for b in rows:
            np.testing.assert_allclose(
                y[b, : num_read[b]],
                want[b, length[b] : length[b] + num_read[b]],
                rtol=1e-4,
                atol=1e-4,
            )
        length = length + rng.integers(num_read + 1, dtype=np.int32)
