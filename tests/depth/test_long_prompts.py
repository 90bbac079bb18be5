"""Long prompts, of which a recursion computes no more than the front that holds its tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion_reference import D_MODEL, init, make_stack

from effjax.depth import MixtureOfRecursions, TokenChoice
from effjax.depth.mixture_of_recursions import LONG
from effjax.depth.sharing import FRONTS, run

ROWS, RECURSIONS = 3, 2
SIZES = [round(front * LONG) for front in FRONTS]


class Runs(nn.Module):
    """`run` of one stack."""

    @nn.compact
    def __call__(self, stack, x, segment_ids, states, used):
        stack = stack.take([0]).clone(parent=self, name="shared")
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), segment_ids.shape)
        where = {"positions": positions, "segment_ids": segment_ids, "states": (states,)}
        return run((stack,), x, used=used, **where)


@pytest.fixture(scope="module")
def compiled():
    """Parameters, and `Runs` under jit, with and without a number of tokens."""
    stack = make_stack(1)
    states = stack.init_state(ROWS, LONG, D_MODEL)
    inputs = stack, jnp.zeros((ROWS, LONG, D_MODEL)), jnp.ones((ROWS, LONG), jnp.int32), states
    variables = Runs().init(jax.random.key(0), *inputs, None)

    @jax.jit
    def apply(x, segment_ids, used):
        return Runs().apply(variables, stack, x, segment_ids, states, used)

    return apply, states


@pytest.mark.parametrize("used", [0, 1, SIZES[0], SIZES[0] + 1, SIZES[1], SIZES[1] + 1, LONG])
def test_only_the_front_is_computed(compiled, used, rng):
    apply, states = compiled
    x = rng.normal(size=(ROWS, LONG, D_MODEL)).astype(np.float32)
    counts = np.array([used, used // 2, 0])
    segments = (np.arange(LONG) < counts[:, None]).astype(np.int32)
    y, new_states, aux = apply(x, segments, jnp.int32(used))
    front = next(size for size in [0, *SIZES] if size >= used)
    np.testing.assert_array_equal(y[:, front:], x[:, front:])
    if used == 0:
        new_states, states = (jax.tree.leaves(part) for part in (new_states, states))
        assert all(np.array_equal(a, b) for a, b in zip(new_states, states, strict=True))
        assert not any(np.any(value) for value in aux.values())
        return
    assert np.abs(y[:, :used] - x[:, :used]).min(axis=-1).max() > 0
    whole, all_states, _ = apply(x, segments, None)
    real = segments > 0
    np.testing.assert_allclose(y[real], whole[real], rtol=1e-5, atol=1e-5)
    for got, expected in zip(*map(jax.tree.leaves, (new_states, all_states)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_sharing", ["recursion_wise", "shared"])
def test_a_prompt_and_what_follows_are_the_parallel_pass(kv_sharing, rng):
    """With routers that send few, some and most tokens on, so that every front is used."""
    routing = TokenChoice(balancing="loss_free")
    mor = MixtureOfRecursions(RECURSIONS, "cycle", routing, kv_sharing)
    stack = make_stack(RECURSIONS)
    x = rng.normal(size=(ROWS, LONG + 1, D_MODEL)).astype(np.float32)
    lengths = np.array([LONG, LONG // 2, 3])
    is_token = np.arange(LONG + 1) < lengths[:, None]
    is_token[:, LONG] = True  # the next token of each row
    positions = np.maximum(np.cumsum(is_token, axis=1) - 1, 0).astype(np.int32)
    segments = is_token.astype(np.int32)
    variables = init(mor, RECURSIONS, rng, (x, positions, segments), router_scale=8.0)
    bias = variables["params"]["routing"]["balance_bias"]

    @jax.jit
    def whole(variables):
        y, _, aux = mor.apply(variables, stack, x, positions=positions, segment_ids=segments)
        return y, aux["token/depth"]

    @jax.jit
    def in_two(variables):
        state, parts = mor.init_state(stack, ROWS, LONG + 1, D_MODEL), []
        for part in (slice(0, LONG), slice(LONG, LONG + 1)):
            where = {"positions": positions[:, part], "segment_ids": segments[:, part]}
            y, state, _ = mor.apply(variables, stack, x[:, part], state=state, **where)
            parts.append(y)
        return jnp.concatenate(parts, axis=1)

    # The bias on the first depth decides how many tokens take more than one.
    biased = {}
    for added in np.linspace([-1, 0], [1, 0], 201, dtype=np.float32):
        routed = jax.tree.map(lambda a, added=added: added if a is bias else a, variables)
        expected, depth = whole(routed)
        most = int((depth[:, :LONG] > 1).sum(axis=1).max())
        front = next(size for size in [0, *SIZES] if size >= most)
        biased.setdefault(front, (routed, expected))
    assert set(biased) == {0, *SIZES}
    for routed, expected in biased.values():
        got = in_two(routed)
        np.testing.assert_allclose(got[is_token], expected[is_token], rtol=1e-4, atol=1e-4)
