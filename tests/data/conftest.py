"""Small corpora."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def corpus(tmp_path: Path, rng: np.random.Generator) -> Callable[..., dict[str, bytes]]:
    """Writes `count` files of random bytes, each after its own name; returns what is in them."""

    def write(count: int, longest: int = 300) -> dict[str, bytes]:
        texts = {}
        for index in range(count):
            name = f"d{index:03d}.txt"
            texts[name] = name.encode() + rng.bytes(int(rng.integers(1, longest)))
            (tmp_path / name).write_bytes(texts[name])
        return texts

    return write
