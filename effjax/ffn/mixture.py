"""What all mixtures of experts share: route, dispatch, report. How to route is up to each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.ffn import dispatch
from effjax.ffn.dense import Dense, Gated, activation
from effjax.ffn.experts import Experts
from effjax.nn import Linear, scalars
from effjax.registry import unknown
from effjax.routing.balance import TokenMask, load, token_mean
from effjax.routing.confidence import router_entropy, router_z_loss
from effjax.routing.placement import capacity
from effjax.routing.top_k import Assignment, check_choices

DISPATCHES = ("capacity", "dropless")


class MixtureOfExperts(nn.Module):
    """A feed-forward that is a weighted sum of a few out of many (Shazeer et al., 1701.06538).

    Concrete mixtures define `route`. Routing is in float32 whatever the dtype of x. Padding goes to
    no expert and counts in no loss and no metric. Beside those chosen there may be one expert that
    every token passes (DeepSeekMoE, Dai et al., 2024, arXiv 2401.06066, section 3.2), scaled in
    Qwen1.5-MoE by a gate of its own, sigmoid(w x).

    With `dispatch="capacity"` the time that a batch takes is that of the buffers, full or not;
    `flops/spent` counts the rows in use. Few tokens leave most buffers empty, so decode with
    `dispatch="dropless"`; the parameters are the same.

    Reports `loss/load_balancing`, `loss/router_z`, `moe/fraction_dropped` (of the assignments to
    true experts), `moe/router_entropy` (nats), `moe/mean_experts` (true experts computed for a
    token), `moe/load_imbalance` (load of the busiest true expert over the mean load: 1 is even),
    `flops/spent`, `flops/full` and `token/experts` [B, T].

    Attributes:
      num_experts: E, the true experts.
      hidden_dim: hidden width of an expert; None means `gated_width(d_model)` if gated and
        4 * d_model if not.
      gated: whether experts are gated (SwiGLU with `silu`) or dense.
      activation: one of `effjax.ffn.dense.ACTIVATIONS`.
      dispatch: one of `DISPATCHES`.
      capacity_factor: rows of an expert over the even share of the assignments to true experts,
        for `dispatch="capacity"`.
      balance_weight: weight of the load-balancing loss.
      z_weight: weight of the router z-loss.
      jitter: in training, the router sees x times noise from uniform(1 - jitter, 1 + jitter)
        (Switch Transformer, arXiv 2101.03961, appendix C).
      init_scale: scale of the initialisers of experts and router.
      shared_hidden_dim: hidden width of the expert that every token passes; None: there is none.
      gate_shared: whether a gate scales it.
    """

    num_experts: int = 8
    hidden_dim: int | None = None
    gated: bool = True
    activation: str = "silu"
    dispatch: str = "capacity"
    capacity_factor: float = 1.25
    balance_weight: float = 0.01
    z_weight: float = 1e-3
    jitter: float = 0.0
    init_scale: float = 1.0
    shared_hidden_dim: int | None = None
    gate_shared: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_choices(self.choices, self.num_experts, self.nulls)
        activation(self.activation)
        if self.dispatch not in DISPATCHES:
            raise ValueError(unknown("dispatch", self.dispatch, DISPATCHES))
        for field in ("hidden_dim", "shared_hidden_dim"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}; valid: None or at least 1")
        if self.gate_shared and self.shared_hidden_dim is None:
            raise ValueError("gate_shared=True without shared_hidden_dim; valid: give both")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter}; valid: 0 <= jitter < 1")
        for field in ("capacity_factor", "init_scale"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)}; valid: greater than 0")
        for field in ("balance_weight", "z_weight"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)}; valid: 0 or greater")

    @property
    def choices(self) -> int:
        """Experts that a token chooses, K."""
        raise NotImplementedError

    @property
    def nulls(self) -> int:
        """Null experts among those a token can choose, M."""
        return 0

    def route(
        self, logits: Float[Array, "B T EM"], mask: TokenMask
    ) -> tuple[Assignment, scalars.Scalars]:
        """Chooses the experts of each token; returns them with the weighted balancing losses over `mask`."""
        raise NotImplementedError

    @property
    def expected_experts(self) -> float:
        """True experts that a token chooses when the load is even: K * E / (E + M)."""
        return self.choices * self.num_experts / (self.num_experts + self.nulls)

    def flops_per_token(self, d_model: int) -> float:
        """Forward FLOPs of a token all of whose K choices are true experts and computed."""
        chosen = self.choices * self._experts().flops_per_row(d_model)
        return self._router_flops(d_model) + chosen + self._shared_flops(d_model)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ):
        """Returns (y [B, T, D], aux); a token that is given no expert, and shares none, gets exactly 0."""
        logits = self._logits(x, train)
        assignment, losses = self.route(logits, mask)
        if mask is not None:
            assignment = assignment.only(mask)
        experts = self._experts(parent=self, name="experts")
        if self.dispatch == "capacity":
            num_rows = capacity(
                x.shape[1], self.expected_experts, self.num_experts, self.capacity_factor
            )
            y, kept = dispatch.capacity(experts, x, assignment, num_rows)
        else:
            y, kept = dispatch.dropless(experts, x, assignment)
        if self.shared_hidden_dim is not None:
            y = y + self._shared_output(x)
        losses["loss/router_z"] = self.z_weight * router_z_loss(logits, mask)
        return y, losses | self._report(assignment, kept, mask, x.shape[-1])

    def _logits(self, x: Float[Array, "B T D"], train: bool) -> Float[Array, "B T EM"]:
        x = x.astype(jnp.float32)
        if train and self.jitter:
            key = self.make_rng("routing")
            x *= jax.random.uniform(key, x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        return Linear(self.num_experts + self.nulls, kernel_init=init, name="router")(x)

    def _shared(self, parent: nn.Module | None = None, name: str | None = None) -> nn.Module:
        expert = Gated if self.gated else Dense
        return expert(self.shared_hidden_dim, self.activation, parent=parent, name=name)

    def _shared_output(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y, _ = self._shared(parent=self, name="shared")(x)
        return nn.sigmoid(Linear(1, name="shared_gate")(x)) * y if self.gate_shared else y

    def _shared_flops(self, d_model: int) -> float:
        if self.shared_hidden_dim is None:
            return 0.0
        return self._shared().flops_per_token(d_model) + 2.0 * d_model * self.gate_shared

    def _experts(self, parent: nn.Module | None = None, name: str | None = None) -> Experts:
        return Experts(
            self.num_experts,
            self.hidden_dim,
            self.gated,
            self.activation,
            self.init_scale,
            parent=parent,
            name=name,
        )

    def _router_flops(self, d_model: int) -> float:
        return 2.0 * d_model * (self.num_experts + self.nulls)

    def _report(
        self,
        assignment: Assignment,
        kept: Bool[Array, "B T K"],
        mask: TokenMask,
        d_model: int,
    ) -> scalars.Scalars:
        used = jnp.sum(kept, axis=-1, dtype=jnp.float32)
        chosen = jnp.sum(assignment.true, dtype=jnp.float32)
        loads = load(assignment.indices, self.num_experts)
        mean_experts = token_mean(used, mask)
        always = self._router_flops(d_model) + self._shared_flops(d_model)
        spent = always + mean_experts * self._experts().flops_per_row(d_model)
        return {
            "moe/fraction_dropped": 1 - jnp.sum(used) / jnp.maximum(chosen, 1.0),
            "moe/router_entropy": router_entropy(assignment.probs, mask),
            "moe/mean_experts": mean_experts,
            "moe/load_imbalance": jnp.max(loads) * self.num_experts,
            "token/experts": used,
        } | scalars.flops(spent, self.flops_per_token(d_model))
