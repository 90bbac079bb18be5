"""Training runs the same on XLA and on the TPU kernels, which Pallas' interpreter runs here."""

import secrets

import numpy as np
import pytest
from short_runs import FIELDS, losses, small

SLOW = sorted(set(FIELDS) - {"transformer"})


def on(implementation, model):
    """The model with every mixer that has kernels on that implementation."""
    mixers = tuple(
        mixer.clone(implementation=implementation) if hasattr(mixer, "implementation") else mixer
        for mixer in model.mixers
    )
    return model.clone(mixers=mixers)


@pytest.mark.parametrize(
    "name", ["transformer", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)]
)
def test_losses_on_xla_and_on_the_tpu_kernels_agree(name):
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    xla, tpu = (
        losses(on(implementation, small(name)), name, {}, seed, steps=4)
        for implementation in ("xla", "tpu_interpret")
    )
    assert np.ptp(xla) > 1e-4  # it does train
    np.testing.assert_allclose(tpu, xla, rtol=1e-4)
