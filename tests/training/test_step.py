import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import models
from effjax.objectives import next_token
from effjax.training.state import TrainState, init_state, initialise
from effjax.training.step import make_train_step

MODEL = models.create("transformer", d_model=16, num_layers=1, vocab_size=11, max_seq_len=8)


def make_batch(seed, rows=8, length=8):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(11, size=(rows, length + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "loss_mask": rng.integers(2, size=(rows, length)).astype(np.float32),
    }


def first_state(optimizer, model=MODEL, seed=0, ema=False):
    init = functools.partial(init_state, model, optimizer, seq_len=8, seed=seed, ema=ema)
    return initialise(init)


@pytest.fixture
def seed():
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return seed


def test_cross_entropy_is_that_of_the_unmasked_targets(seed):
    batch = make_batch(seed)
    variables = first_state(optax.sgd(0.1), seed=seed).variables()

    @jax.jit
    def evaluate(variables, batch):
        plain, with_z = (next_token(MODEL, variables, batch, None, z_loss=z) for z in (0.0, 0.1))
        return plain, with_z[0], MODEL.apply(variables, batch["tokens"]).logits

    (loss, metrics), with_z, logits = evaluate(variables, batch)
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    mask = batch["loss_mask"] > 0
    np.testing.assert_allclose(loss, (log_z - target)[mask].mean(), rtol=1e-5)
    assert metrics["weight"] == mask.sum()
    np.testing.assert_allclose(with_z - loss, 0.1 * (log_z[mask] ** 2).mean(), rtol=1e-4)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_is_the_update_of_the_whole_batch(count, seed):
    """Even though the micro-batches have different numbers of targets."""
    optimizer = optax.sgd(0.5)
    batch = make_batch(seed)
    state = first_state(optimizer)
    whole, expected = jax.jit(make_train_step(MODEL, next_token, optimizer))(state, batch)
    parts, found = jax.jit(make_train_step(MODEL, next_token, optimizer, accumulation_steps=count))(
        state, batch
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6),
        parts.params,
        whole.params,
    )
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


def test_ema_follows_its_recurrence_and_a_skipped_step_changes_nothing(seed):
    optimizer = optax.adamw(1e-2)
    batch = make_batch(seed)
    poisoned = batch | {"loss_mask": np.where(batch["targets"] == 3, np.nan, batch["loss_mask"])}
    state = first_state(optimizer, ema=True)
    update = make_train_step(MODEL, next_token, optimizer, ema_decay=0.75, skip_nonfinite=True)
    step = jax.jit(update)
    expected = jax.tree.map(np.asarray, state.params)
    for _ in range(3):
        before, number = state, int(state.step)
        state, metrics = step(state, poisoned)
        assert metrics["skipped"] == 1
        assert state.step == number + 1
        jax.tree.map(np.testing.assert_array_equal, state.replace(step=before.step), before)
        state, metrics = step(state, batch)
        assert metrics["skipped"] == 0
        expected = jax.tree.map(
            lambda e, p: 0.75 * e + 0.25 * np.asarray(p), expected, state.params
        )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.ema, expected)
    assert state.variables()["params"] is state.ema


def test_a_step_is_a_pure_function_of_state_and_batch(seed):
    optimizer = optax.adam(1e-2)
    batch = make_batch(seed)
    state = first_state(optimizer, seed=seed % 100)
    step = jax.jit(make_train_step(MODEL, next_token, optimizer))
    first, again = step(state, batch), step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert isinstance(first[0], TrainState)
    assert first[0].step == 1
    assert np.isfinite(first[1]["grad_norm"])


def test_float32_parameters_under_bfloat16_compute(seed):
    model = MODEL.clone(dtype="bfloat16")
    batch = make_batch(seed)
    state = first_state(optax.sgd(0.1), model)
    state, metrics = jax.jit(make_train_step(model, next_token, optax.sgd(0.1)))(state, batch)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    out, full = (jax.jit(m.apply)(state.variables(), batch["tokens"]) for m in (model, MODEL))
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    error = np.linalg.norm(out.logits - full.logits) / np.linalg.norm(full.logits)
    assert 0 < error < 3e-2
    assert np.isfinite(metrics["loss"])
