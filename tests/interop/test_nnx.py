"""A Linen model in an NNX program: wrapped by Flax's bridge, it trains there as it does here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tiny_models import random_variables

from effjax import models
from effjax.interop.nnx import from_nnx, to_nnx

STEPS = 3
MODEL = models.create("switch", vocab_size=61, d_model=16, num_layers=1)


def loss_of(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def test_a_wrapped_model_trains_in_nnx_as_in_linen(rng):
    variables = random_variables(MODEL, rng)
    tokens = jnp.asarray(rng.integers(0, 61, size=(2, 12)))
    module = to_nnx(MODEL, variables)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(module), variables)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, tokens):
        loss, gradients = nnx.value_and_grad(lambda m: loss_of(m(tokens).logits, tokens))(module)
        optimizer.update(module, gradients)
        return loss

    losses = [step(module, optimizer, tokens) for _ in range(STEPS)]
    expected, trained = in_linen(variables, tokens)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3)  # noqa: E731
    jax.tree.map(close, from_nnx(module), trained)


def test_training_behaviour_draws_from_the_stream_of_the_module(rng):
    tokens = rng.integers(0, 61, size=(2, 12))
    module = to_nnx(MODEL, random_variables(MODEL, rng), nnx.Rngs(routing=3))
    forward = nnx.jit(lambda module: module(tokens, train=True).logits)
    assert not np.array_equal(forward(module), forward(module))  # jitter of the router


def in_linen(variables, tokens):
    """Losses and variables of the same steps without NNX."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, moments):
        loss, gradients = jax.value_and_grad(
            lambda v: loss_of(MODEL.apply(v, tokens).logits, tokens)
        )(variables)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(variables, updates), moments, loss

    moments, losses = optimizer.init(variables), []
    for _ in range(STEPS):
        variables, moments, loss = step(variables, moments)
        losses.append(loss)
    return losses, variables
