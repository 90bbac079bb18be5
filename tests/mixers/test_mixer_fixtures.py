"""Our mixers with recorded weights give the recorded outputs (`fixtures/record_based.py`, `record_mamba.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers import Mamba, Mamba2, ShortConv, SlidingWindow, TaylorLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"


def linear(recorded, name):
    """A PyTorch linear layer as ours: kernels are transposed."""
    params = {"kernel": recorded[f"weights.{name}.weight"].T}
    bias = recorded.get(f"weights.{name}.bias")
    return params if bias is None else params | {"bias": bias}


def split(params, sizes):
    """One layer of ours for each part of the outputs."""
    ends = np.cumsum(list(sizes.values()))[:-1]
    parts = {key: np.split(value, ends, axis=-1) for key, value in params.items()}
    return {name: {key: part[i] for key, part in parts.items()} for i, name in enumerate(sizes)}


def halves(params, names):
    return split(params, dict.fromkeys(names, params["kernel"].shape[1] // len(names)))


def convolution(recorded):
    return {
        "conv": recorded["weights.conv1d.weight"][:, 0].T,
        "conv_bias": recorded["weights.conv1d.bias"],
    }


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


def mamba(recorded):
    params = halves(linear(recorded, "in_proj"), ("value", "gate"))
    params |= split(linear(recorded, "x_proj"), {"step_down": 2, "B": 8, "C": 8})
    step = linear(recorded, "dt_proj")
    params |= {"step_up": {"kernel": step["kernel"]}, "step_bias": step["bias"]}
    params |= {name: recorded[f"weights.{name}"] for name in ("A_log", "D")}
    params |= convolution(recorded) | {"out": linear(recorded, "out_proj")}
    return Mamba(state_dim=8), params


def mamba2(recorded):
    sizes = {"gate": 64, "value": 64, "B": 8, "C": 8, "step": 4}
    params = split(linear(recorded, "in_proj"), sizes)
    params |= {name: recorded[f"weights.{name}"] for name in ("A_log", "D")}
    params |= {"step_bias": recorded["weights.dt_bias"]}
    params |= {"norm_scale": recorded["weights.norm.weight"]}
    params |= convolution(recorded) | {"out": linear(recorded, "out_proj")}
    return Mamba2(head_dim=16, state_dim=8), params


CASES = {
    "based_linear_attention": taylor_linear,
    "based_base_conv": short_conv,
    "based_sliding_window": sliding_window,
    "mamba": mamba,
    "mamba2": mamba2,
}


@pytest.fixture(params=CASES)
def case(request):
    with np.load(FIXTURES / f"{request.param}.npz") as file:
        recorded = dict(file)
    mixer, params = CASES[request.param](recorded)
    ones = jnp.ones(recorded["x"].shape[:2], jnp.int32)
    init = jax.eval_shape(
        mixer.init, jax.random.key(0), recorded["x"], positions=ones, segment_ids=ones
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init["params"])
    return mixer, {"params": params}, recorded


def test_parallel_form(case):
    mixer, variables, recorded = case
    ones = jnp.ones(recorded["x"].shape[:2], jnp.int32)
    positions = ones * jnp.arange(ones.shape[1])
    apply = jax.jit(mixer.apply)
    y, _ = apply(variables, recorded["x"], positions=positions, segment_ids=ones)
    np.testing.assert_allclose(y, recorded["y"], atol=1e-5, rtol=1e-5)


def test_prefill_then_one_token_at_a_time(case):
    mixer, variables, recorded = case
    x = recorded["x"]
    # No recurrent form was recorded for the window; its parallel form is what it must give.
    expected = recorded.get("decoded", recorded["y"])
    length = x.shape[1]
    ones = jnp.ones((2, length), jnp.int32)
    positions = ones * jnp.arange(length)
    apply = jax.jit(mixer.apply)
    state, outputs = mixer.init_state(2, length, x.shape[-1]), []
    for part in (slice(0, 16), *(slice(t, t + 1) for t in range(16, length))):
        y, state = apply(
            variables,
            x[:, part],
            positions=positions[:, part],
            segment_ids=ones[:, part],
            state=state,
        )
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, atol=1e-5, rtol=1e-5)
