"""What every side trains, and on what: a GPT-2 of nanoGPT's small size, on the bytes of this library's own source.

Both sides start from the same numbers, so that their losses must be the same too. Only the standard library and NumPy.
"""

from pathlib import Path

import numpy as np

LAYERS, WIDTH, HEADS, LENGTH, BATCH, VOCABULARY = 6, 384, 6, 256, 8, 256
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0
# Steps of a turn.
STEPS = 2
# Steps over which the losses of the sides are compared.
COMPARED = 8

# Of one layer: what its sizes are in units of WIDTH, [in, out].
MATRICES = {
    "query": (1, 1),
    "key": (1, 1),
    "value": (1, 1),
    "out": (1, 1),
    "up": (1, 4),
    "down": (4, 1),
}


def weights() -> dict[str, np.ndarray]:
    """The matrices before the first step, by name; the scales of all norms begin as ones, and there are no biases."""
    random = np.random.RandomState(0)
    shapes = {"embedding": (VOCABULARY, WIDTH), "position": (LENGTH, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"{layer}/{name}": (WIDTH * n, WIDTH * m) for name, (n, m) in MATRICES.items()}
    return {
        name: 0.02 * random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a step and the token after each, int32 [BATCH, LENGTH]."""
    starts = np.random.RandomState(step).randint(len(_TEXT) - LENGTH - 1, size=(BATCH, 1))
    rows = _TEXT[starts + np.arange(LENGTH + 1)].astype(np.int32)
    return rows[:, :-1], rows[:, 1:]


def _text() -> np.ndarray:
    root = Path(__file__).parents[2] / "effjax"
    return np.frombuffer(b"".join(p.read_bytes() for p in sorted(root.rglob("*.py"))), np.uint8)


_TEXT = _text()
