import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a new seed every run; pytest shows the seed of a failed test."""
    seed = np.random.SeedSequence().entropy
    print(f"rng seed: {seed}")
    return np.random.default_rng(seed)
