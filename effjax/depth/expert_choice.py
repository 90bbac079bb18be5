"""Expert-choice routing over depth: every recursion picks its tokens among those of the one before."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.depth.router import Router
from effjax.depth.subset import Subset, slots_for
from effjax.nn import scalars
from effjax.registry import register, unknown
from effjax.routing.balance import token_mean
from effjax.routing.confidence import router_z_loss

ACTIVATIONS = {"sigmoid": nn.sigmoid, "tanh": jnp.tanh, "identity": lambda logits: logits}
GATINGS = ("weighted", "additive")
SELECTIONS = ("aux_loss", "aux_router")

# A new capacity is a new program, so the warm-up moves in this many steps.
WARMUP_STAGES = 8


@register("routing", "expert_choice")
class ExpertChoice(nn.Module):
    """Recursion r takes the share c_r of the tokens that its router scores highest, the rest have left for good.

    Mixture-of-Recursions (Bae et al., 2025, arXiv 2507.10524, section 2.2.1). Each recursion has a router of its
    own, with the score s_t = <w_r, x_t> of the tokens that passed the recursion before (hierarchical filtering).
    The chosen ones become

        x_t <- x_t + g_t f(x_t)        g_t = alpha * sigmoid(s_t)

    and all others stay what they are.

    A choice of the highest scores in a sequence looks into the future, so a decoder cannot make it. It goes by
    sigmoid(s_t) > 1/2 instead (`train=False`), which an auxiliary loss, the binary cross-entropy between the
    score and being chosen, brings into line. A recursion that takes every token of the one before it decides
    nothing.

    A row's capacity is its share of the row's real tokens: padding is never chosen and changes nothing.

    Attributes:
      capacities: c_r of each recursion, not increasing; None means 1, (N-1)/N, ..., 1/N for N recursions.
      capacity_warmup_steps: training steps over which capacities go from 1 down to c_r along a cosine; 0 for none.
      warmup_progress: how far that has come, from 0 to 1; `at_step` sets it.
      router: "linear" or "mlp".
      activation: of the scores in the gate, one of `ACTIVATIONS`.
      alpha: factor of the gate.
      gating: "weighted" as above, or "additive" for g_t = 1.
      temperature: hidden states are divided by it before they are scored.
      selection: what decides at evaluation: the router itself ("aux_loss"), or a second one that learns to
        predict it from hidden states without a gradient to them ("aux_router").
      aux_weight: weight of the binary cross-entropy.
      z_weight: weight of the squared scores (router z-loss).
    """

    capacities: tuple[float, ...] | None = None
    capacity_warmup_steps: int = 0
    warmup_progress: float = 1.0
    router: str = "linear"
    activation: str = "sigmoid"
    alpha: float = 0.1
    gating: str = "weighted"
    temperature: float = 1.0
    selection: str = "aux_loss"
    aux_weight: float = 1e-3
    z_weight: float = 0.0

    def at_step(self, step: int) -> "ExpertChoice":
        """The routing with the capacities of a training step, which change `WARMUP_STAGES` times."""
        if self.capacity_warmup_steps <= 0:
            return self
        stage = min(WARMUP_STAGES, step * WARMUP_STAGES // self.capacity_warmup_steps)
        return self.clone(warmup_progress=stage / WARMUP_STAGES)

    def capacities_now(self, num_recursions: int) -> tuple[float, ...]:
        """The share of the tokens that each recursion takes.

        Raises:
          ValueError: if `capacities` does not fit the recursions, leaves (0, 1], or increases.
        """
        final = self.capacities
        if final is None:
            final = tuple((num_recursions - r) / num_recursions for r in range(num_recursions))
        if len(final) != num_recursions:
            raise ValueError(
                f"capacities={final}; valid: one for each of {num_recursions} recursions"
            )
        bounds = (1.0, *final)
        if not all(0 < now <= before for before, now in zip(bounds, final, strict=False)):
            raise ValueError(f"capacities={final}; valid: within (0, 1] and not increasing")
        remaining = 0.5 * (1 + math.cos(math.pi * self.warmup_progress))
        return tuple(c + (1 - c) * remaining for c in final)

    @nn.compact
    def __call__(
        self,
        recurse: Callable,
        x: Float[Array, "B T D"],
        caches: Any,
        *,
        num_recursions: int,
        segment_ids: Int[Array, "B T"],
        train: bool,
    ):
        """Runs the recursions.

        Args:
          recurse: `(r, x, subset, caches) -> (f(x) of the subset's tokens [B, K, D], caches, aux)`.
          x: hidden states.
          caches: what `recurse` takes from one recursion to the next.
          num_recursions: N.
          segment_ids: 0 marks padding.
          train: take the highest scores of the row, in static shapes; else each token decides by itself.

        Returns:
          (x [B, T, D], caches, aux).
        """
        self._check()
        real = segment_ids > 0
        active, agreed = real, real
        depth = jnp.zeros(real.shape, jnp.float32)
        before, reports = 1.0, []
        for r, capacity in enumerate(self.capacities_now(num_recursions)):
            logits, decision, report = self._score(r, x, active)
            decided = active if capacity == before else active & (decision > 0)
            if train:
                chosen = highest(logits, active, capacities_of_row(capacity, real))
                report |= self._supervise(decision, chosen, active)
                agreed &= decided == chosen
                size = slots_for(int(capacity_table(capacity, x.shape[1])[-1]), x.shape[1])
            else:
                chosen, size = decided, x.shape[1]
            subset = Subset.of(chosen, size)
            y, caches, aux = recurse(r, x, subset, caches)
            if self.gating == "weighted":
                gate = self.alpha * ACTIVATIONS[self.activation](logits)
                y = y * subset.take(gate)[..., None].astype(y.dtype)
            x = x + subset.spread(y)
            report[f"depth/fraction_selected_{r + 1}"] = token_mean(chosen, real)
            reports += [aux, report]
            depth, active, before = depth + chosen, chosen, capacity
        summary = {"token/depth": depth, "depth/mean_recursions": token_mean(depth, real)}
        if train:
            summary["depth/selection_agreement"] = token_mean(agreed, real)
        return x, caches, scalars.combine([*reports, summary])

    @nn.compact
    def begin(self, x: Float[Array, "B 1 D"], *, num_recursions: int):
        """Decides on the first recursion of one token a row, as at evaluation (`Depthwise`).

        Returns:
          (whether it takes it [B, 1], its gate [B, 1]).
        """
        self._check()
        return self._decide(0, x, self.capacities_now(num_recursions))

    @nn.compact
    def after(
        self,
        r: Int[Array, "B 1"],
        x: Float[Array, "B 1 D"],
        y: Float[Array, "B 1 D"],
        gate: Float[Array, "B 1"],
        *,
        num_recursions: int,
    ):
        """What becomes of one token a row by recursion r of its own, which made y of it (`Depthwise`).

        Returns:
          (x [B, 1, D], whether it takes the next recursion [B, 1], the gate of that [B, 1]).
        """
        x = x + y * gate[..., None].astype(y.dtype)
        goes_on, next_gate = jnp.zeros(r.shape, bool), gate
        capacities = self.capacities_now(num_recursions)
        for upcoming in range(1, num_recursions):
            here = r + 1 == upcoming
            goes, gate = self._decide(upcoming, x, capacities)
            goes_on, next_gate = goes_on | (here & goes), jnp.where(here, gate, next_gate)
        return x, goes_on, next_gate

    def _decide(self, r, x, capacities):
        """Whether a token that passed the recursion before takes recursion r, and with which gate."""
        logits, decision, _ = self._scores(r, x)
        takes_all = capacities[r] == (1.0, *capacities)[r]
        gate = jnp.ones(logits.shape)
        if self.gating == "weighted":
            gate = self.alpha * ACTIVATIONS[self.activation](logits)
        return jnp.ones(logits.shape, bool) if takes_all else decision > 0, gate

    def _check(self):
        for field, valid in (
            ("activation", ACTIVATIONS),
            ("gating", GATINGS),
            ("selection", SELECTIONS),
        ):
            if getattr(self, field) not in valid:
                raise ValueError(unknown(field, getattr(self, field), valid))

    def _scores(self, r, x):
        """Router scores [B, T], those that decide at evaluation, and FLOPs per token."""
        # Scoring a whole row costs less than gathering the hidden states of its active tokens.
        router = Router(1, self.router, self.temperature, name=f"router_{r}")
        logits = decision = router(x)[..., 0]
        flops = router.flops_per_token(x.shape[-1])
        if self.selection == "aux_router":
            auxiliary = Router(1, self.router, self.temperature, name=f"aux_router_{r}")
            decision = auxiliary(jax.lax.stop_gradient(x))[..., 0]
            flops *= 2
        return logits, decision, flops

    def _score(self, r, x, active):
        """Router scores [B, T], those that decide at evaluation, and what they report."""
        logits, decision, flops = self._scores(r, x)
        entropy = optax.sigmoid_binary_cross_entropy(decision, nn.sigmoid(decision))
        report = scalars.flops(flops, 0.0)
        report["depth/router_entropy"] = token_mean(entropy, active)
        if self.z_weight:
            report["loss/router_z"] = self.z_weight * router_z_loss(logits[..., None], active)
        return logits, decision, report

    def _supervise(self, decision, chosen, active):
        """Teaches the deciding scores what was chosen, and says how well they know it."""
        error = optax.sigmoid_binary_cross_entropy(decision, chosen.astype(decision.dtype))
        name = "loss/router_bce" if self.selection == "aux_loss" else "loss/router_aux"
        return {
            name: self.aux_weight * token_mean(error, active),
            "depth/router_accuracy": token_mean((decision > 0) == chosen, active),
        }


def capacity_table(capacity: float, length: int) -> Int[np.ndarray, " N"]:
    """How many tokens a recursion takes of rows of 0, 1, ..., `length` tokens: the floor, but at least 1."""
    counts = np.arange(length + 1)
    # 0.29 * 100 is just below 29: the floor is meant of the exact product.
    return np.minimum(counts, np.maximum(1, np.floor(capacity * counts + 1e-6))).astype(np.int32)


def capacities_of_row(capacity: float, real: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """How many tokens a recursion of that capacity takes of each row."""
    return jnp.asarray(capacity_table(capacity, real.shape[1]))[jnp.sum(real, axis=1)]


def highest(
    logits: Float[Array, "B T"], active: Bool[Array, "B T"], count: Int[Array, " B"]
) -> Bool[Array, "B T"]:
    """The `count` active tokens of each row with the highest scores, the earlier one of two equals."""
    scores = jnp.where(active, jax.lax.stop_gradient(logits), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1)
    return active & (rank < count[:, None])
