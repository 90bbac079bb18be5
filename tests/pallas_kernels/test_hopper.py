"""What kernels for NVIDIA Hopper share, where a kernel's own tests do not show it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import softmax


@pytest.mark.parametrize("variable", ["NPROC", "PJRT_NPROC"])
def test_too_few_threads_for_an_interpreter_are_an_error(monkeypatch, variable):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv(variable, "2")
    x = jnp.zeros((2, 8))
    # One a device, of which there are eight.
    assert softmax(x, implementation="gpu_interpret").shape == x.shape
    monkeypatch.setattr(jax, "local_device_count", lambda platform: 1)
    with pytest.raises(ValueError, match=r"XLA has 2 threads .* needs 3: set NPROC=3"):
        softmax(x, implementation="gpu_interpret")
    monkeypatch.setenv(variable, "3")
    assert softmax(x, implementation="gpu_interpret").shape == x.shape
