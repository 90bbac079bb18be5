"""Our mixers with the weights of the BASED authors' give what theirs recorded (`fixtures/record_based.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import ShortConv, SlidingWindow, TaylorLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"


def linear(recorded, name):
    """A PyTorch linear layer as ours: kernels are transposed."""
    params = {"kernel": recorded[f"weights.{name}.weight"].T}
    bias = recorded.get(f"weights.{name}.bias")
    return params if bias is None else params | {"bias": bias}


def halves(params, names):
    """One layer of ours for each equal part of the outputs."""
    parts = {key: np.split(value, len(names), axis=-1) for key, value in params.items()}
    return {name: {key: part[i] for key, part in parts.items()} for i, name in enumerate(names)}


def taylor_linear(recorded):
    names = {"query": "proj_q", "key": "proj_k", "value": "proj_v", "out": "out_proj"}
    params = {ours: linear(recorded, theirs) for ours, theirs in names.items()}
    return TaylorLinear(num_heads=2, feature_dim=8), params


def short_conv(recorded):
    params = halves(linear(recorded, "in_proj"), ("value", "gate"))
    taps = recorded["weights.conv.conv.weight"][:, 0].T
    return ShortConv(), params | {"conv": taps, "out": linear(recorded, "out_proj")}


def sliding_window(recorded):
    params = halves(linear(recorded, "Wqkv"), ("query", "key", "value"))
    out = {"kernel": recorded["weights.out_proj.weight"].T}  # its bias was recorded as zero
    # `block_size=6` there means six tokens back, so seven with the token itself.
    return SlidingWindow(num_heads=1, window=7, rope_base=None), params | {"out": out}


CASES = {
    "based_linear_attention": taylor_linear,
    "based_base_conv": short_conv,
    "based_sliding_window": sliding_window,
}


@pytest.fixture(params=CASES)
def case(request):
    with np.load(FIXTURES / f"{request.param}.npz") as file:
        recorded = dict(file)
    mixer, params = CASES[request.param](recorded)
    ones = jnp.ones((2, 24), jnp.int32)
    init = jax.eval_shape(
        mixer.init, jax.random.key(0), recorded["x"], positions=ones, segment_ids=ones
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init["params"])
    return mixer, {"params": params}, recorded


def test_parallel_form(case):
    mixer, variables, recorded = case
    ones = jnp.ones((2, 24), jnp.int32)
    positions = ones * jnp.arange(24)
    apply = jax.jit(mixer.apply)
    y, _ = apply(variables, recorded["x"], positions=positions, segment_ids=ones)
    np.testing.assert_allclose(y, recorded["y"], atol=1e-5, rtol=1e-5)


def test_prefill_then_one_token_at_a_time(case):
    mixer, variables, recorded = case
    x = recorded["x"]
    # No recurrent form was recorded for the window; its parallel form is what it must give.
    expected = recorded.get("decoded", recorded["y"])
    ones = jnp.ones((2, 24), jnp.int32)
    positions = ones * jnp.arange(24)
    apply = jax.jit(mixer.apply)
    state, outputs = mixer.init_state(2, 24, x.shape[-1]), []
    for part in (slice(0, 16), *(slice(t, t + 1) for t in range(16, 24))):
        y, state = apply(
            variables,
            x[:, part],
            positions=positions[:, part],
            segment_ids=ones[:, part],
            state=state,
        )
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, atol=1e-5, rtol=1e-5)
