"""Switch against the layer of transformers, recorded by `tests/fixtures/record_switch.py`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ffn import Switch


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "switch.npz"))


def test_outputs_losses_and_gradients(recorded):
    """Also for tokens that found their expert full, whose output is 0."""
    num_experts, _, hidden_dim = recorded["up"].shape
    num_tokens = recorded["x"].shape[1]
    layer = Switch(
        num_experts=num_experts,
        hidden_dim=hidden_dim,
        # Rounded up, these are the rows of the recorded layer.
        capacity_factor=(int(recorded["capacity"]) - 0.5) * num_experts / num_tokens,
        balance_weight=1.0,
        z_weight=1.0,
    )
    params = {
        "router": {"kernel": recorded["router"][0]},
        "experts": {"up": recorded["up"], "down": recorded["down"]},
    }

    def loss(params, x):
        y, aux = layer.apply({"params": params}, x)
        losses = aux["loss/load_balancing"], aux["loss/router_z"]
        return jnp.sum(y * jnp.float32(recorded["cotangent"])) + sum(losses), (y, *losses)

    given = jax.tree.map(jnp.float32, (params, recorded["x"]))
    (d_params, d_x), (y, balance, z) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*given)

    assert (recorded["y"] == 0).all(-1).any()
    for found, name in (
        (y, "y"),
        (balance, "balance"),
        (z, "z"),
        (d_x, "d_x"),
        (d_params["router"]["kernel"][None], "d_router"),
        (d_params["experts"]["up"], "d_up"),
        (d_params["experts"]["down"], "d_down"),
    ):
        np.testing.assert_allclose(found, recorded[name], rtol=1e-5, atol=1e-6, err_msg=name)
