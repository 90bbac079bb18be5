"""One optimizer update as a pure function of (state, batch)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from effjax.training.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    model,
    objective: Callable,
    optimizer: optax.GradientTransformation,
    *,
    accumulation_steps: int = 1,
    ema_decay: float | None = None,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, dict[str, Any]], tuple[TrainState, Metrics]]:
    """The update function, to be jitted by the caller with its shardings and a donated state.

    Args:
      model: passed to the objective.
      objective: `(model, variables, batch, rng) -> (loss, metrics)`.
      optimizer: the optimizer.
      accumulation_steps: micro-batches that a batch is cut into; their gradients are averaged by each one's
        `metrics["weight"]` (targets), so the update is that of the whole batch.
      ema_decay: decay of the parameter average, or None for none.
      skip_nonfinite: leave the state as it is, but for `step`, where the loss, its gradient or the update is not
        finite.

    Returns:
      `step(state, batch) -> (state, metrics)`; metrics are those of the objective with `loss` and `grad_norm` (before
      clipping), and with `skipped` (1 or 0) if that may happen.
    """

    def loss_fn(params, batch, rng):
        return objective(model, {"params": params}, batch, rng)

    def step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Metrics]:
        given, state = state, jax.device_put(state, jax.memory.Space.Device)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if accumulation_steps == 1:
            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, batch, rng
            )
            metrics = {**metrics, "loss": loss}
        else:
            grads, metrics = _accumulate(loss_fn, state.params, batch, rng, accumulation_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updated = dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)
        if skip_nonfinite:
            norms = jnp.stack([metrics["loss"], metrics["grad_norm"], optax.tree.norm(updates)])
            is_finite = jnp.all(jnp.isfinite(norms))
            updated = jax.tree.map(functools.partial(jnp.where, is_finite), updated, state)
            metrics["skipped"] = 1 - is_finite.astype(jnp.float32)
        updated = dataclasses.replace(updated, step=state.step + 1)
        return _like(given, updated), metrics

    return step


def _like(given: TrainState, updated: TrainState) -> TrainState:
    """The updated state in the memories, of devices or of hosts, that the given one is in."""
    return jax.tree.map(
        lambda x, now: jax.device_put(now, jax.typeof(x).memory_space), given, updated
    )


def _accumulate(loss_fn, params, batch, rng, count):
    """Gradients and metrics of a batch in `count` micro-batches, weighted by their numbers of targets."""

    def split(x):
        # The rows of one micro-batch lie `count` apart, so that a sharded batch axis stays where it is.
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    def weighted(index, micro_batch):
        key = jax.random.fold_in(rng, index)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro_batch, key)
        weight = metrics.pop("weight")
        return weight, jax.tree.map(lambda x: weight * x, (grads, {**metrics, "loss": loss}))

    def add(total, micro):
        return jax.tree.map(jnp.add, total, weighted(*micro)), None

    micro_batches = (jnp.arange(count), jax.tree.map(split, batch))
    shapes = jax.eval_shape(weighted, *jax.tree.map(lambda x: x[0], micro_batches))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (weight, total), _ = jax.lax.scan(add, zero, micro_batches)
    grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1.0), total)
    return grads, {**metrics, "weight": weight}
