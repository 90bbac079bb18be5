"""optax's optimizers, as configs bind them, take the steps that their papers write down: NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import optim

STEPS, RATE, DECAY = 6, 0.05, 0.3


def lion(x, grads, b1=0.9, b2=0.99):
    """Chen et al., 2023, arXiv 2302.06675, program 1."""
    m = np.zeros_like(x)
    for g in grads:
        x = x - RATE * (np.sign(b1 * m + (1 - b1) * g) + DECAY * x)
        m = b2 * m + (1 - b2) * g
    return x


def lamb(x, grads, b1=0.9, b2=0.999, eps=1e-6):
    """You et al., 2020, arXiv 1904.00962, algorithm 2, with phi the identity."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        ratio = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        update = ratio + DECAY * x
        x = x - RATE * np.linalg.norm(x) / np.linalg.norm(update) * update
    return x


def adabelief(x, grads, b1=0.9, b2=0.999, eps=1e-16):
    """Zhuang et al., 2020, arXiv 2010.07468, algorithm 2."""
    m, s = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        x = x - RATE * m / (1 - b1**t) / (np.sqrt(s / (1 - b2**t)) + eps)
    return x


@pytest.mark.parametrize("published", [lion, lamb, adabelief], ids=lambda f: f.__name__)
def test_steps_are_the_papers(rng, published):
    name = published.__name__
    decay = {} if name == "adabelief" else {"weight_decay": DECAY}
    spec = optim.spec(name, clip_norm=None, schedule={"name": "constant", "peak": RATE}, **decay)
    optimizer, _ = optim.build(spec, num_steps=STEPS)

    start = rng.normal(size=(3, 4))
    grads = rng.normal(size=(STEPS, 3, 4))
    with jax.enable_x64(True):  # a gradient and its mean all but cancel now and then
        params = {"kernel": jnp.asarray(start)}
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update({"kernel": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], published(start, grads), rtol=1e-4, atol=1e-5)
