"""Decode states that can forget the tokens of their newest call, for every mixer alike.

A cache by position could drop its last entries, but a ring has overwritten what they displaced, and a sum has added
them up. All of them, though, are functions of the mixer's inputs, and the input at a token depends on no later token:
those of tokens that stay are right even where the tokens after them are forgotten. So a call leaves the state as it was
before its tokens and keeps its inputs beside it; the next call takes in those that stay before it does its own work.
That costs the maps that the state is made by (keys and values, say) at a few tokens, by weights that the call reads
anyway; what else the mixer would compute for them is not used, and the compiler drops it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class TentativeState:
    """The state of a mixer, and the tokens of the newest call, of which some may be forgotten.

    With scanned layers every array has a leading axis of the layers.

    Attributes:
      before: the mixer's state before those tokens.
      inputs: [B, T, D] the mixer's inputs at them.
      positions: [B, T] their positions.
      segment_ids: [B, T] their segments; 0 marks padding.
      end: [B] tokens at this position and behind it are forgotten.
      after: from a call, the mixer's state if all of them stay; None once `settle` has said which.
    """

    before: Any
    inputs: Float[Array, "B T D"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    end: Int[Array, " B"]
    after: Any = None


class Tentative(nn.Module):
    """A mixer with a state that can forget, under the seam and the parameter names of the mixer.

    The result of a call with such a state goes through `settle` before the next call. Without a state, or with one that
    is only read, the mixer is called as it is.

    Attributes:
      mixer: any causal mixer.
      num_tokens: tokens of a call, at least 2.
    """

    mixer: nn.Module
    num_tokens: int

    def setup(self):
        # A copy: a template that other layers use too is not to be bound here.
        self.inner = self.mixer.clone(parent=None, name=None)
        nn.share_scope(self, self.inner)

    @property
    def shares_state(self) -> bool:
        """As the mixer says."""
        return getattr(self.mixer, "shares_state", False)

    def init_state(
        self, batch_size: int, max_length: int, d_model: int, dtype="float32"
    ) -> TentativeState:
        """An empty state of the mixer, and no token that it could forget."""
        no_tokens = jnp.zeros((batch_size, self.num_tokens), jnp.int32)
        return TentativeState(
            before=self.mixer.init_state(batch_size, max_length, d_model, dtype),
            inputs=jnp.zeros((*no_tokens.shape, d_model), dtype),
            positions=no_tokens,
            segment_ids=no_tokens,
            end=jnp.zeros((batch_size,), jnp.int32),
        )

    def flops_per_token(self, d_model: int, context: int, **options: Any) -> float:
        """As of the mixer."""
        return self.mixer.flops_per_token(d_model, context, **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        if not isinstance(state, TentativeState):
            return self.inner(x, positions=positions, segment_ids=segment_ids, state=state)
        stays = state.positions < state.end[:, None]
        _, before = self.inner(
            state.inputs,
            positions=state.positions,
            segment_ids=jnp.where(stays, state.segment_ids, 0),
            state=state.before,
        )
        y, after = self.inner(x, positions=positions, segment_ids=segment_ids, state=before)
        inputs = x.astype(state.inputs.dtype)
        return y, TentativeState(before, inputs, positions, segment_ids, state.end, after)


def settle(states: Any, end: Int[Array, " B"]) -> Any:
    """Forgets the tokens of the newest call at position `end` and behind it.

    Args:
      states: the decode states that a depth policy returned, of mixers that are `Tentative`.
      end: of each row.
    """
    return _each(
        lambda s: dataclasses.replace(s, end=jnp.broadcast_to(end, s.end.shape), after=None), states
    )


def make_tentative(states: Any, empty: Any) -> Any:
    """The decode states of a model whose mixers are `Tentative`, from those of the model without.

    Args:
      states: what a depth policy keeps.
      empty: what it keeps of the tentative mixers before the first token; its size is taken.
    """
    return _each(lambda s, plain: dataclasses.replace(s, before=plain), empty, states)


def _each(function: Callable, states: Any, *rest: Any) -> Any:
    """The function of every tentative state in the states of a depth policy, and of what stands there in the others."""
    is_tentative = lambda leaf: isinstance(leaf, TentativeState)  # noqa: E731
    return jax.tree.map(function, states, *rest, is_leaf=is_tentative)
