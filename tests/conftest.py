"""Eight virtual CPU devices for the mesh tests, one compilation cache for all workers and runs, and fresh seeds.

Tests compile hundreds of programs and run each for milliseconds, so the compiler is told not to optimise machine code.
"""

import os
from pathlib import Path

_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
_CACHE = Path(__file__).parents[1] / ".cache" / "xla"

# Before anything imports jax, and inherited by the processes that tests start.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import numpy as np  # noqa: E402 (after the environment is set)
import pytest  # noqa: E402


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a new seed every run; pytest shows the seed of a failed test."""
    seed = np.random.SeedSequence().entropy
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)
