"""Mixture-of-Recursions: a recursive Transformer in which every token gets its own number of recursions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.depth.expert_choice import ExpertChoice
from effjax.depth.sharing import Layout, run
from effjax.depth.stack import Stack
from effjax.depth.subset import Subset
from effjax.nn import scalars
from effjax.registry import describe, register, unknown

KV_SHARINGS = ("recursion_wise", "shared")


@register("depth", "mixture_of_recursions")
class MixtureOfRecursions(nn.Module):
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

    Attributes:
      num_recursions: N, the most that a token can get.
      sharing: which layers share parameters, one of `sharing.STRATEGIES`.
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
        return self.clone(routing=self.routing.at_step(step))

    @nn.compact
    def __call__(
        self,
        stack: Stack,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        train: bool = False,
    ):
        """Returns (x [B, T, D], aux).

        Raises:
          ValueError: for layers that do not divide into the recursions, or for `kv_sharing="shared"` with
            blocks that cannot share their state.
        """
        layout = Layout.of(self.sharing, len(stack), self.num_recursions)
        self._check_kv_sharing(stack, layout)
        first, recursions, last = layout.bind(stack, self)
        everywhere = {"positions": positions, "segment_ids": segment_ids, "train": train}
        x, _, first_aux = run(first, x, **everywhere)
        x, aux = self.routing(
            functools.partial(self._recurse, recursions, everywhere),
            x,
            num_recursions=self.num_recursions,
            segment_ids=segment_ids,
            train=train,
        )
        x, _, last_aux = run(last, x, **everywhere)
        return x, scalars.combine([first_aux, aux, last_aux])

    def _recurse(self, recursions, everywhere, r, x, subset: Subset, states):
        """Recursion r on the tokens of a subset: (f(x) [B, K, D], states for the next recursion, aux)."""
        y, new_states, aux = run(
            recursions[r],
            subset.take(x),
            positions=subset.take(everywhere["positions"]),
            segment_ids=subset.take(everywhere["segment_ids"]),
            states=states,
            train=everywhere["train"],
        )
        if self.kv_sharing == "recursion_wise":
            states = None
        elif r == 0:
            states = freeze(new_states)
        batch, length, d_model = x.shape
        used = subset.size / length
        if not everywhere["train"]:
            used = jnp.sum(subset.token < length) / (batch * length)
        full = sum(stack.flops_per_token(d_model, length) for stack in recursions[r])
        aux |= scalars.flops(aux["flops/spent"] * used, full)
        aux |= {k: subset.spread(v) for k, v in aux.items() if k.startswith("token/")}
        return y, states, aux

    def _check_kv_sharing(self, stack: Stack, layout: Layout):
        if self.kv_sharing not in KV_SHARINGS:
            raise ValueError(unknown("kv_sharing", self.kv_sharing, KV_SHARINGS))
        if self.kv_sharing == "recursion_wise":
            return
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


def freeze(states):
    """The states of mixers, to be read only."""
    is_state = lambda leaf: hasattr(leaf, "freeze")  # noqa: E731
    return jax.tree.map(lambda state: state.freeze(), states, is_leaf=is_state)
