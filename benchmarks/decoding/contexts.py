"""A token decoded behind a text of some length, by models that differ in nothing but their mixers."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import models
from effjax.mixers import KVState
from effjax.models import DecodeState, SequenceModel

# Width, depth and feed-forward of all of them; the mixers are those of the presets, at their own sizes.
SIZE = {"d_model": 256, "num_layers": 10, "vocab_size": 260}
ATTENTION = {"name": "attention", "num_heads": 4}
MODELS = {
    "attention": {"name": "transformer", "mixers": (ATTENTION,)},
    "based": {"name": "based"},
    "sliding_window": {
        "name": "transformer",
        "mixers": ({"name": "sliding_window", "window": 128},),
    },
    "mamba2": {"name": "transformer", "mixers": ({"name": "mamba2"},)},
}


def build(name: str, max_length: int) -> SequenceModel:
    """One of `MODELS` with room for that many tokens."""
    return models.create(**MODELS[name], **SIZE, max_seq_len=max_length)


@functools.cache
def variables_of(name: str) -> Any:
    """Those of one of `MODELS`, which are the same for every context."""
    return jax.jit(build(name, 1).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def aged(model: SequenceModel, batch_size: int, context: int, max_length: int) -> DecodeState:
    """A decode state as `context` tokens leave it; keys, values and sums are random: time does not depend on them."""
    state = model.init_state(batch_size, max_length)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(state))))

    def age(part):
        if not isinstance(part, KVState):
            is_sum = jnp.issubdtype(part.dtype, jnp.floating)
            # An integer of a recurrent state is the segment that it is of.
            return jax.random.uniform(next(keys), part.shape) if is_sum else jnp.ones_like(part)
        slots = jnp.arange(part.k.shape[1])
        filled = slots < context
        # In a ring that is full, the token of position p lies in slot p modulo its length.
        laps = jnp.maximum(context - 1 - slots, 0) // len(slots)
        return part.replace(
            k=jax.random.normal(next(keys), part.k.shape),
            v=jax.random.normal(next(keys), part.v.shape),
            positions=jnp.broadcast_to(slots + laps * len(slots), part.positions.shape),
            segment_ids=jnp.broadcast_to(filled.astype(jnp.int32), part.segment_ids.shape),
            length=jnp.full_like(part.length, context),
        )

    layers = jax.tree.map(age, state.layers, is_leaf=lambda part: isinstance(part, KVState))
    return state.replace(layers=layers, length=jnp.full_like(state.length, context))


class Decoder:
    """A model that decodes one token a row after the other, its state written in place."""

    def __init__(self, name: str, batch_size: int, context: int, steps: int):
        max_length = context + steps
        model = build(name, max_length)
        self._variables = variables_of(name)
        self._steps = steps
        self._fresh = functools.partial(aged, model, batch_size, context, max_length)
        self._step = jax.jit(functools.partial(_step, model), donate_argnums=1)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self._fresh().layers))

    def seconds(self) -> list[float]:
        """Of each step behind the context, the first (which may compile) left out."""
        state = jax.tree.map(jnp.copy, self._fresh())  # no two arrays are one buffer
        token = jnp.zeros((len(state.length), 1), jnp.int32)
        taken = []
        for _ in range(self._steps):
            start = time.perf_counter()
            token, state = jax.block_until_ready(self._step(self._variables, state, token))
            taken.append(time.perf_counter() - start)
        return taken[1:]


def _step(model: SequenceModel, variables: Any, state: DecodeState, token: jax.Array):
    output = model.apply(variables, token, state=state)
    return jnp.argmax(output.logits, axis=-1), output.state


def crossover(contexts: list[int], ours: list[float], theirs: list[float]) -> float | None:
    """The context from which on `ours` is faster, between the measured ones by a line through both; None: never."""
    gain = np.array(theirs) - np.array(ours)
    if gain[-1] <= 0:
        return None
    slower = np.flatnonzero(gain <= 0)
    if not slower.size:
        return float(contexts[0])
    i = slower[-1]
    share = -gain[i] / (gain[i + 1] - gain[i])
    return contexts[i] + share * (contexts[i + 1] - contexts[i])
