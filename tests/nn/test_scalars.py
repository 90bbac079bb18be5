import jax.numpy as jnp
import numpy as np

from effjax.nn import scalars


def test_layers_add_losses_and_flops_and_average_metrics(rng):
    a, b, c = rng.normal(size=3)
    picture = rng.normal(size=(2, 1, 4))
    reports = [
        {"loss/balance": a, "flops/spent": 10.0, "moe/dropped": a, "token/experts": picture[0]},
        {"loss/balance": b, "flops/spent": 5.0, "moe/dropped": b, "token/experts": picture[1]},
        {"loss/z": c, "flops/spent": 1.0},
    ]
    combined = scalars.combine(reports)
    assert combined.keys() == {
        "loss/balance",
        "loss/z",
        "flops/spent",
        "moe/dropped",
        "token/experts",
    }
    np.testing.assert_allclose(combined["loss/balance"], a + b)
    np.testing.assert_allclose(combined["loss/z"], c)
    np.testing.assert_allclose(combined["flops/spent"], 16)
    np.testing.assert_allclose(combined["moe/dropped"], (a + b) / 2)  # over the layers that have it
    np.testing.assert_allclose(combined["token/experts"], picture.sum(axis=0))


def test_collapse_of_stacked_reports_is_combine_of_single_ones(rng):
    stacked = {name: rng.integers(100, size=5) for name in ("loss/z", "flops/full", "depth/mean")}
    stacked["token/depth"] = rng.integers(100, size=(5, 2, 3))
    collapsed = scalars.collapse({k: jnp.float32(v) for k, v in stacked.items()})
    np.testing.assert_array_equal(collapsed["loss/z"], stacked["loss/z"].sum())
    np.testing.assert_array_equal(collapsed["flops/full"], stacked["flops/full"].sum())
    np.testing.assert_allclose(collapsed["depth/mean"], stacked["depth/mean"].mean(), rtol=1e-6)
    np.testing.assert_array_equal(collapsed["token/depth"], stacked["token/depth"].sum(axis=0))


def test_losses_and_metrics_split_a_report():
    report = {"loss/z": 1.0, "depth/mean": 2.0, "flops/full": 3.0, "token/depth": 4.0}
    assert scalars.losses(report) == {"loss/z": 1.0}
    assert scalars.metrics(report) == {k: v for k, v in report.items() if k != "loss/z"}


def test_flops_full_defaults_to_spent():
    assert scalars.flops(7.0) == {"flops/spent": 7.0, "flops/full": 7.0}
    assert scalars.flops(7.0, 9.0) == {"flops/spent": 7.0, "flops/full": 9.0}
