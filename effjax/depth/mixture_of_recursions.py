"""Mixture-of-Recursions: a recursive Transformer in which every token gets its own number of recursions."""

import functools
from typing import TypedDict

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.depth.depthwise import Depthwise
from effjax.depth.expert_choice import ExpertChoice
from effjax.depth.kv_sharing import KV_SHARINGS
from effjax.depth.sharing import Layout, RecursiveState, run
from effjax.depth.stack import Stack
from effjax.depth.subset import Subset
from effjax.nn import scalars
from effjax.registry import describe, register, unknown

# Tokens of a prompt of which recursions compute only a part, if they can.
LONG = 64


class _Tokens(TypedDict):
    """What every stack is told of the tokens of a call."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    train: bool


@register("depth", "mixture_of_recursions")
class MixtureOfRecursions(Depthwise):
    """Shared blocks applied up to N times to a token, as often as a router says (Bae et al., 2025, arXiv 2507.10524).

    The tokens of a recursion are gathered into a shorter row, so its blocks, attention and feed-forward alike,
    cost what those tokens cost. They keep their positions and segments. In the order of the paper's section
    2.2: the routing says which tokens they are, and `kv_sharing` what they attend to:

      recursion_wise: each other; every recursion has keys and values of its own, for its tokens only.
      shared: the keys and values of the first recursion (recursive KV sharing). Later recursions compute
        queries only.

    The paper routes over cycles. Over a sequence, a recursion is a run of layers like any other, with one
    router before it.

    While training, `flops/spent` counts the static capacity. At evaluation every token decides for itself,
    which no static shape can hold: the parallel pass then runs over whole rows with the chosen tokens at the
    front and the rest masked, and `flops/spent` counts the chosen ones, which is what decoding them costs
    (attention as if all were chosen).

    With a decode state, that of a recursion holds the tokens that passed it and no others. A recursion that no row
    of the batch takes is not computed at all, and of a long prompt a later one computes a quarter, a half or all of the
    rows, whichever holds the tokens that take it. What a token's recursions are does not depend on the tokens after it,
    so decoding gives what the parallel pass at evaluation gives.

    Attributes:
      num_recursions: N, the most that a token can get.
      sharing: which layers share parameters, one of `sharing.STRATEGIES` or `sharing.UNTIED`.
      routing: `ExpertChoice` or `TokenChoice`.
      kv_sharing: "recursion_wise" or "shared".
    """

    num_recursions: int = 3
    sharing: str = "middle_cycle"
    routing: nn.Module = ExpertChoice()
    kv_sharing: str = "recursion_wise"

    def at_step(self, step: int) -> "MixtureOfRecursions":
        """The policy as it is at a training step: the routing's capacities move along their warm-up."""
        if not hasattr(self.routing, "at_step"):
            return self
        routing = self.routing.at_step(step)
        return self if routing == self.routing else self.clone(routing=routing)

    def init_state(
        self, stack: Stack, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> RecursiveState:
        """Empty decode states, for every recursion or for the first alone as `kv_sharing` says.

        Each has room for `max_length` tokens: nothing says beforehand how many will pass a recursion.

        Raises:
          ValueError: as a call does.
        """
        size = (batch_size, max_length, d_model, dtype)
        return self.layout(stack).init_state(stack, self.num_states(), *size)

    def repeated(self, stack: Stack) -> tuple[Stack, ...]:
        """As for `Depthwise`; ValueError where later recursions read what a pipeline does not keep."""
        if self.kv_sharing == "shared":
            raise ValueError(
                "kv_sharing='shared' with a pipeline, which keeps no keys and values for later recursions; valid: "
                "kv_sharing='recursion_wise', or mesh.pipeline=1"
            )
        return super().repeated(stack)

    def num_states(self) -> int:
        """As `kv_sharing` says."""
        return KV_SHARINGS[self.kv_sharing].num_states(self.num_recursions)

    def itinerary(self) -> nn.Module:
        """The routing."""
        return self.routing

    @nn.compact
    def __call__(
        self,
        stack: Stack,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: RecursiveState | None = None,
        train: bool = False,
    ):
        """Returns (x [B, T, D], the new decode state or None if none was given, aux).

        Raises:
          ValueError: for layers that do not divide into the recursions, or for `kv_sharing="shared"` with
            blocks that cannot share their state.
        """
        if self.kv_sharing == "shared":
            stack = stack.clone(num_microbatches=None)
        first, recursions, last = self.layout(stack).bind(stack, self)
        before, passed, behind = (
            (None, None, None) if state is None else (state.first, state.recursions, state.last)
        )
        tokens = _Tokens(positions=positions, segment_ids=segment_ids, train=train)
        x, first_state, first_aux = run(first, x, states=before, **tokens)
        x, caches, aux = self.routing(
            functools.partial(self._recurse, recursions, tokens),
            x,
            KV_SHARINGS[self.kv_sharing](passed),
            num_recursions=self.num_recursions,
            segment_ids=segment_ids,
            train=train,
        )
        x, last_state, last_aux = run(last, x, states=behind, **tokens)
        new_state = RecursiveState(first_state, caches.states, last_state)
        aux = scalars.combine([first_aux, aux, last_aux])
        return x, None if state is None else new_state, aux

    def _recurse(self, recursions, tokens: _Tokens, r, x, subset: Subset, caches):
        """Recursion r on the tokens of a subset: (f(x) [B, K, D], caches for the next recursion, aux)."""
        batch, length, d_model = x.shape
        num_used = jnp.sum(subset.token < length, axis=1)
        # A short prompt is not worth the compiling, and the first recursion takes all of it.
        may_skip = caches.states is not None and (length == 1 or (length >= LONG and r > 0))
        y, states, aux = run(
            recursions[r],
            subset.take(x),
            positions=subset.take(tokens["positions"]),
            segment_ids=subset.take(tokens["segment_ids"]),
            states=caches.before(r, length),
            train=tokens["train"],
            used=jnp.max(num_used) if may_skip else None,
        )
        used = subset.size / length
        if not tokens["train"]:
            used = jnp.sum(num_used) / (batch * length)
        full = sum(stack.flops_per_token(d_model, length) for stack in recursions[r])
        aux |= scalars.flops(aux["flops/spent"] * used, full)
        aux |= {k: subset.spread(v) for k, v in aux.items() if k.startswith("token/")}
        return y, caches.after(r, states), aux

    def layout(self, stack: Stack) -> Layout:
        """Raises ValueError as a call does."""
        if self.kv_sharing not in KV_SHARINGS:
            raise ValueError(unknown("kv_sharing", self.kv_sharing, KV_SHARINGS))
        layout = Layout.of(self.sharing, len(stack), self.num_recursions)
        if self.kv_sharing == "shared":
            self._check_shareable(stack, layout)
        return layout

    def _check_shareable(self, stack: Stack, layout: Layout) -> None:
        if len(set(layout.steps)) > 1:
            raise ValueError(
                f"kv_sharing='shared' with sharing={self.sharing!r}, whose recursions have different blocks; "
                "valid: sharing='cycle' or 'middle_cycle', or kv_sharing='recursion_wise'"
            )
        for layer in (layer for layers in layout.shared for layer in layers):
            mixer = stack.blocks[layer].mixer
            if not getattr(mixer, "shares_state", False):
                raise ValueError(
                    f"kv_sharing='shared' with the mixer {describe(mixer)['name']!r}, whose state later recursions "
                    "cannot read; valid: attention mixers, or kv_sharing='recursion_wise'"
                )
