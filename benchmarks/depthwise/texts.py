"""Texts made by models of one size: a recursive one, and a Mixture-of-Recursions whose tokens take some mean depth."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import serving
from effjax.depth import TokenChoice
from effjax.models import SequenceModel
from effjax.serving import Generation

BIAS_STEPS, BIAS_RATE = 4000, 0.02


@dataclasses.dataclass(frozen=True)
class Workload:
    """Texts that are to be made.

    Attributes:
      prompts: token ids of each.
      num_tokens: new tokens of each.
      num_slots: texts at a time.
      seed: of the draws.
    """

    prompts: list[np.ndarray]
    num_tokens: int
    num_slots: int
    seed: int = 0

    def plain(self, model: SequenceModel, variables: Any) -> list[Generation]:
        """By `generate`: as many texts as there are slots, then as many more. All of a batch end together."""
        keys = jax.random.split(jax.random.key(self.seed), len(self.prompts))
        starts = range(0, len(self.prompts), self.num_slots)
        return [
            serving.generate(
                model,
                variables,
                self.prompts[start : start + self.num_slots],
                self.num_tokens,
                key=keys[start : start + self.num_slots],
            )
            for start in starts
        ]

    def depthwise(self, model: SequenceModel, variables: Any) -> list[Generation]:
        """By `generate_depthwise`: the next text begins where one has ended."""
        keys = jax.random.split(jax.random.key(self.seed), len(self.prompts))
        return [
            serving.generate_depthwise(
                model, variables, self.prompts, self.num_tokens, num_slots=self.num_slots, key=keys
            )
        ]


@dataclasses.dataclass(frozen=True)
class Way:
    """A model and a way to make texts with it."""

    model: SequenceModel
    variables: Any
    make: Callable[[SequenceModel, Any], list[Generation]]

    def run(self) -> tuple[float, list[Generation]]:
        """Tokens a second of all texts, prompts read and all, and the texts."""
        start = time.perf_counter()
        made = self.make(self.model, self.variables)
        seconds = time.perf_counter() - start
        return sum(int(np.sum(texts.lengths)) for texts in made) / seconds, made


def steerable(mor: SequenceModel) -> SequenceModel:
    """The model with the routing that `steered` knows: token choice with a bias on the scores."""
    return mor.clone(depth=mor.depth.clone(routing=TokenChoice(balancing="loss_free")))


def random_variables(model: SequenceModel, seed: int = 0) -> Any:
    """Variables as training begins with them."""
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))


def steered(model: SequenceModel, variables: Any, mean_depth: float, seed: int = 0) -> Any:
    """The variables with a router that gives random tokens so many recursions on average.

    The router's scores get a deviation of 1, so that tokens differ. The bias on them is moved as loss-free balancing
    does (arXiv 2408.15664), towards the load of highest entropy with that mean instead of an even one.
    """
    params = variables["params"]
    routing = params["depth"]["routing"]
    x = np.asarray(_before_recursions(model, variables), np.float64)
    noise = np.random.default_rng(seed).normal(size=routing["router"]["router"]["kernel"].shape)
    kernel = noise / np.sqrt(np.sum(x**2, axis=-1).mean())
    scores = x @ kernel
    gates = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    target, bias = load_of_mean(mean_depth, model.depth.num_recursions), np.zeros(gates.shape[1])
    for step in range(BIAS_STEPS):
        load = np.bincount(np.argmax(gates + bias, axis=-1), minlength=len(bias)) / len(gates)
        bias += BIAS_RATE * (1 - step / BIAS_STEPS) * (target - load)
    router = {"router": {"kernel": jnp.float32(kernel)}}
    routing = {**routing, "router": router, "balance_bias": jnp.float32(bias)}
    depth = {**params["depth"], "routing": routing}
    return {**variables, "params": {**params, "depth": depth}}


def _before_recursions(model: SequenceModel, variables: Any) -> jax.Array:
    """Hidden states [V, D] of every token, as the first of a text, where the router reads them."""
    rows = jnp.arange(model.vocab_size)
    enter = lambda: model.apply(  # noqa: E731
        variables,
        rows[:, None],
        rows=rows,
        segment_ids=jnp.ones_like(rows)[:, None],
        state=model.init_pool(model.vocab_size, 1),
        method="enter",
    )
    journey, _ = jax.jit(enter)()
    return journey.x[:, 0]


def load_of_mean(mean: float, num_recursions: int) -> np.ndarray:
    """Shares of the depths 1 to N, proportional to powers of one number, with that mean."""
    depths = np.arange(1, num_recursions + 1)
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        weights = np.exp(middle * (depths - num_recursions * (middle > 0)))
        shares = weights / weights.sum()
        low, high = (middle, high) if shares @ depths < mean else (low, middle)
    return shares
