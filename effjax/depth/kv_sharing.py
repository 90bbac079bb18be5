"""Whose keys and values a recursion attends to, in the parallel form and while decoding.

The two of Mixture-of-Recursions (Bae et al., 2025, arXiv 2507.10524, section 2.2.2). A policy takes one through a
call: `before` a recursion it gives the states that its blocks begin with, `after` it takes those that they end with.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Int

from effjax.mixers import KVState, PagedKVState, TentativeState


@dataclasses.dataclass(frozen=True)
class RecursionWise:
    """Every recursion has its own: those of the tokens that pass it.

    Attributes:
      states: decode states of every recursion; None in the parallel form, which keeps nothing.
    """

    states: tuple | None

    @staticmethod
    def num_states(num_recursions: int) -> int:
        """How many recursions have a decode state."""
        return num_recursions

    def before(self, r: int, num_tokens: int) -> tuple | None:
        return None if self.states is None else self.states[r]

    def after(self, r: int, new: tuple) -> "RecursionWise":
        if self.states is None:
            return self
        return RecursionWise((*self.states[:r], new, *self.states[r + 1 :]))


@dataclasses.dataclass(frozen=True)
class Shared:
    """Those of the first recursion, which later ones read and do not write (recursive KV sharing).

    Attributes:
      states: decode states of the first recursion, as a tuple of one; None in the parallel form.
      read: what the later recursions of this call read.
    """

    states: tuple | None
    read: tuple | None = None

    @staticmethod
    def num_states(num_recursions: int) -> int:
        """How many recursions have a decode state."""
        return 1

    def before(self, r: int, num_tokens: int) -> tuple | None:
        if r:
            return self.read
        if self.states is None:
            return None
        (first,) = self.states
        # One token sees exactly what is in the cache after it.
        return first if num_tokens == 1 else _each(_lend, first)

    def after(self, r: int, new: tuple) -> "Shared":
        if r:
            return self
        if self.states is None:
            return Shared(None, _each(lambda s: s.freeze(), new))
        return Shared((_each(_kept, new),), _each(_seen, new))


KV_SHARINGS: dict[str, type[RecursionWise] | type[Shared]] = {
    "recursion_wise": RecursionWise,
    "shared": Shared,
}


@flax.struct.dataclass
class _Lending:
    """A cache to which a call appends several tokens, all of which later recursions of it have to see.

    In a ring, the last of the tokens may take the slot of a key that the first of them sees.

    Attributes:
      cache: what is kept.
    """

    frozen = False

    cache: KVState | PagedKVState

    @property
    def length(self) -> Int[Array, " B"]:
        return self.cache.length

    def order(self) -> Int[Array, "B S"]:
        return self.cache.order()

    def append(self, new: KVState) -> "_Lent":
        return _Lent(self.cache.append(new), self.cache.concatenate(new))

    def concatenate(self, new: KVState) -> KVState:
        return self.cache.concatenate(new)


@flax.struct.dataclass
class _Lent(_Lending):
    """A cache after those tokens.

    Attributes:
      seen: the cache before the tokens, and the tokens.
    """

    seen: KVState


def _lend(state: Any) -> Any:
    if isinstance(state, TentativeState):
        return dataclasses.replace(state, before=_lend(state.before))
    return _Lending(state)


def _seen(state: Any) -> KVState | PagedKVState:
    """What the tokens of a call saw in the first recursion, for the later ones to read."""
    if isinstance(state, TentativeState):
        return _seen(state.after)
    return state.seen.freeze() if isinstance(state, _Lent) else state.freeze(newest=True)


def _kept(state: Any) -> Any:
    """The state after a call, of the type that it had before."""
    if isinstance(state, TentativeState):
        return dataclasses.replace(state, before=_kept(state.before), after=None)
    return state.cache if isinstance(state, _Lending) else state


def _each(function: Any, states: tuple) -> tuple:
    """The function of every cache in the states of stacks."""
    caches = KVState | PagedKVState | TentativeState | _Lending
    return jax.tree.map(function, states, is_leaf=lambda leaf: isinstance(leaf, caches))
