"""Token-choice routing over depth: every token picks its number of recursions once, at the start."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.depth.router import Router
from effjax.depth.subset import Subset, slots_for
from effjax.nn import scalars
from effjax.registry import register, unknown
from effjax.routing.balance import load, load_balancing_loss, loss_free_bias_loss, token_mean
from effjax.routing.confidence import router_entropy, router_z_loss

ACTIVATIONS = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
GATINGS = ("weighted", "additive")
BALANCINGS = ("loss", "loss_free")


@register("routing", "token_choice")
class TokenChoice(nn.Module):
    """Every token passes recursions 1 to i, where i is the depth that a router scores highest for it.

    Mixture-of-Recursions (Bae et al., 2025, arXiv 2507.10524, section 2.2.1): with the gates
    g_t = alpha * softmax(W x_t) and the depth i = argmax g_t, of the hidden state x_t before the recursions,

        x_t^(r+1) = f(x_t^r)                     for r < i
        x_t^(i+1) = x_t^1 + g_t,i f(x_t^i)       which is the token's result.

    The choice is causal as it is, but nothing holds the load of the depths even: a balancing loss or a bias on the
    scores does (section 2.2.1; the depths are its experts).

    How many tokens reach a recursion is known only at run time, and shapes are static. While training,
    recursion r has room for `capacity_factor` times the tokens that reach it under even load, (N-r+1)/N of the
    row; the first in the row get it, and a token without a place ends one recursion earlier, with the gate of
    the depth that it really has. At evaluation there is room for all.

    Attributes:
      capacity_factor: room in each recursion, relative to even load.
      router: "linear" or "mlp".
      activation: "softmax" over the depths or "sigmoid" of each.
      alpha: factor of the gate.
      gating: "weighted" as above, or "additive" for a gate of 1.
      temperature: hidden states are divided by it before they are scored.
      balancing: "loss", or "loss_free" for a learned bias on the scores (arXiv 2408.15664).
      balance_weight: weight of the balancing loss; the bias has none, its rate is the optimizer's.
      z_weight: weight of the router z-loss.
    """

    capacity_factor: float = 1.25
    router: str = "linear"
    activation: str = "softmax"
    alpha: float = 1.0
    gating: str = "weighted"
    temperature: float = 1.0
    balancing: str = "loss"
    balance_weight: float = 0.1
    z_weight: float = 1e-5

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
        """Runs the recursions. Arguments and results as for `ExpertChoice`."""
        self._check()
        real = segment_ids > 0
        gates, wanted, report = self._choose(x, num_recursions, real)
        sizes = self.sizes(num_recursions, x.shape[1]) if train else (x.shape[1],) * num_recursions
        depth = fit(jnp.where(real, wanted, 0), sizes)
        gate = self._gate(gates, depth)
        start, reports = x, [report]
        for r, size in enumerate(sizes):
            subset = Subset.of(depth > r, slots_for(size, x.shape[1]))
            y, caches, aux = recurse(r, x, subset, caches)
            y = subset.spread(y)
            ends = start + gate[..., None].astype(y.dtype) * y
            x = jnp.where(
                (depth == r + 1)[..., None], ends, jnp.where((depth > r)[..., None], y, x)
            )
            reports += [aux, {f"depth/fraction_selected_{r + 1}": token_mean(depth > r, real)}]
        summary = {
            "token/depth": depth.astype(jnp.float32),
            "depth/mean_recursions": token_mean(depth, real),
            "depth/fraction_dropped": token_mean(depth < wanted, real),
        }
        return x, caches, scalars.combine([*reports, summary])

    @nn.compact
    def begin(self, x: Float[Array, "B 1 D"], *, num_recursions: int):
        """Decides on the depth of one token a row, as at evaluation (`Depthwise`).

        Returns:
          (whether it takes the first recursion [B, 1], which it does, (x, its depth [B, 1], its gate [B, 1])).
        """
        self._check()
        is_token = jnp.ones(x.shape[:2], bool)
        gates, depth, _ = self._choose(x, num_recursions, is_token)
        return is_token, (x, depth, self._gate(gates, depth))

    def after(
        self,
        r: Int[Array, "B 1"],
        x: Float[Array, "B 1 D"],
        y: Float[Array, "B 1 D"],
        kept: tuple,
        *,
        num_recursions: int,
    ):
        """What becomes of one token a row by recursion r of its own, which made y of it (`Depthwise`).

        Returns:
          (x [B, 1, D], whether it takes the next recursion [B, 1], `kept` as it was).
        """
        start, depth, gate = kept
        goes_on = r + 1 < depth
        ends = start + gate[..., None].astype(y.dtype) * y
        return jnp.where(goes_on[..., None], y, ends), goes_on, kept

    def sizes(self, num_recursions: int, length: int) -> tuple[int, ...]:
        """Places of each recursion in a row of `length` tokens while training; the first has one for all."""
        return tuple(
            min(
                length,
                math.ceil(self.capacity_factor * length * (num_recursions - r) / num_recursions),
            )
            if r
            else length
            for r in range(num_recursions)
        )

    def _gate(self, gates, depth):
        """The gate [B, T] of the last recursion of each token."""
        if self.gating == "additive":
            return jnp.ones(depth.shape)
        last = jnp.maximum(depth - 1, 0)[..., None]
        return jnp.take_along_axis(gates, last, axis=-1)[..., 0]

    def _choose(self, x, num_recursions, real):
        """Gates of all depths [B, T, N], the depth from 1 to N that each token wants [B, T], and a report."""
        router = Router(num_recursions, self.router, self.temperature, name="router")
        logits = router(x)
        gates = self.alpha * ACTIVATIONS[self.activation](logits)
        scores, bias = gates, None
        if self.balancing == "loss_free":
            bias = self.param("balance_bias", nn.initializers.zeros_init(), (num_recursions,))
            scores = gates + bias
        index = jnp.argmax(scores, axis=-1)
        report = scalars.flops(router.flops_per_token(x.shape[-1]), 0.0)
        report["depth/router_entropy"] = router_entropy(jax.nn.softmax(logits), real)
        if bias is None:
            loss = load_balancing_loss(gates, index[..., None], mask=real)
            report["loss/balancing"] = self.balance_weight * loss
        else:
            share = load(index[..., None], num_recursions, real)
            report["loss/balancing"] = loss_free_bias_loss(share, bias)
        if self.z_weight:
            report["loss/router_z"] = self.z_weight * router_z_loss(logits, real)
        return gates, index + 1, report

    def _check(self):
        if self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor}; valid: above 0")
        for field, valid in (
            ("activation", ACTIVATIONS),
            ("gating", GATINGS),
            ("balancing", BALANCINGS),
        ):
            if getattr(self, field) not in valid:
                raise ValueError(unknown(field, getattr(self, field), valid))


def fit(wanted: Int[Array, "B T"], sizes: tuple[int, ...]) -> Int[Array, "B T"]:
    """The depth that each token gets where recursion r has `sizes[r]` places in a row, given to the first that come.

    Whether a token finds a place depends on the tokens before it alone, so causality is kept.
    """
    stays: Bool[Array, "B T"] = wanted > 0
    depth = jnp.zeros_like(wanted)
    for r, size in enumerate(sizes):
        stays &= wanted > r
        stays &= jnp.cumsum(stays, axis=1) <= size
        depth += stays
    return depth
