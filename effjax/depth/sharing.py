"""Which parameters each layer of a recursive Transformer uses.

The four strategies of Mixture-of-Recursions (Bae et al., 2025, arXiv 2507.10524, section 2.1), for 6 shared
layers and 3 recursions, with A and B the unique blocks and F and L the unique first and last layer:

    cycle              A B A B A B        middle_cycle       F A B A B A B L
    sequence           A A A B B B        middle_sequence    F A A A B B B L

and the two without any sharing, which leave of a Mixture-of-Recursions its routing over depth:

    untied             A B C D E G        middle_untied      F A B C D E G L
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax.depth.stack import Stack
from effjax.nn import scalars
from effjax.registry import unknown

STRATEGIES = ("cycle", "sequence", "middle_cycle", "middle_sequence")
UNTIED = ("untied", "middle_untied")
# Parts of a row that are computed where the rest is padding; each is a program of its own.
FRONTS = (1 / 4, 1 / 2, 1)


@flax.struct.dataclass
class RecursiveState:
    """The decode state of a recursive Transformer: that of every application of every layer.

    Attributes:
      first: states of the stack before the recursions, if there is one.
      recursions: for each recursion that keeps something, the states of the stacks that it applies.
      last: states of the stack after the recursions, if there is one.
    """

    first: tuple
    recursions: tuple
    last: tuple

    @classmethod
    def of(cls, runs: tuple) -> "RecursiveState":
        """The state whose `runs` these are."""
        first, *recursions, last = runs
        return cls(first, tuple(recursions), last)

    def runs(self) -> tuple:
        """States of everything that is run, in order."""
        return (self.first, *self.recursions, self.last)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the layers of a stack become a recursive Transformer.

    Layers that are always applied together form one shared stack: a cycle has one of all its unique blocks, a
    sequence has one for each block, and without sharing there is one for each recursion. A unique block is built like
    the first layer that it stands for.

    Attributes:
      first: layers with parameters of their own that every token passes before the recursions.
      shared: layers of each shared stack.
      steps: for each recursion, the shared stacks that it applies, in order.
      last: layers with parameters of their own that every token passes after the recursions.
    """

    first: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    last: tuple[int, ...]

    @classmethod
    def of(cls, strategy: str, num_layers: int, num_recursions: int) -> "Layout":
        """The layout of a strategy over `num_layers` effective layers.

        A recursion is a run of as many consecutive layers as there are unique blocks. In a cycle these are the
        blocks in order, so every recursion is the same function; in a sequence, recursions differ.

        Raises:
          ValueError: for an unknown strategy, or layers that do not divide into the recursions.
        """
        if strategy not in STRATEGIES + UNTIED:
            raise ValueError(unknown("sharing", strategy, STRATEGIES + UNTIED))
        if num_recursions < 1:
            raise ValueError(f"num_recursions={num_recursions}; valid: at least 1")
        ends = 1 if strategy.startswith("middle_") else 0
        depth, remainder = divmod(num_layers - 2 * ends, num_recursions)
        if depth < 1 or remainder:
            valid = ", ".join(str(2 * ends + k * num_recursions) for k in (1, 2, 3))
            raise ValueError(
                f"num_layers={num_layers} with sharing={strategy!r} and num_recursions={num_recursions}; "
                f"valid: num_layers of {valid}, ..."
            )
        shared: tuple[tuple[int, ...], ...]
        steps: tuple[tuple[int, ...], ...]
        if strategy.endswith("cycle"):
            shared = (tuple(range(ends, ends + depth)),)
            steps = ((0,),) * num_recursions
        elif strategy in UNTIED:
            runs = range(ends, num_layers - ends, depth)
            shared = tuple(tuple(range(run, run + depth)) for run in runs)
            steps = tuple((r,) for r in range(num_recursions))
        else:
            shared = tuple((ends + block * num_recursions,) for block in range(depth))
            blocks = tuple(layer // num_recursions for layer in range(depth * num_recursions))
            steps = tuple(blocks[r * depth : (r + 1) * depth] for r in range(num_recursions))
        return cls((0,) * ends, shared, steps, (num_layers - 1,) * ends)

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """The stacks that have parameters, by the names of these, and the layers of each."""
        count = len(self.shared)
        names = ["shared"] if count == 1 else [f"shared_{i}" for i in range(count)]
        named = {"first": self.first, **dict(zip(names, self.shared, strict=True))}
        return {name: layers for name, layers in {**named, "last": self.last}.items() if layers}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer whose parameters each of the effective layers uses, in order."""
        recursions = (self.shared[i] for step in self.steps for i in step)
        return self.first + tuple(layer for layers in recursions for layer in layers) + self.last

    @property
    def ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers before and after the recursions."""
        return self.first, self.last

    @property
    def alike(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The recursions that apply the same shared stacks, which is a run of them, by those stacks."""
        return {
            step: tuple(r for r, other in enumerate(self.steps) if other == step)
            for step in dict.fromkeys(self.steps)
        }

    def init_state(self, stack: Stack, num_recursions: int, *size: Any) -> RecursiveState:
        """Empty decode states of the layers around, and of the first so many recursions.

        `size` is what `Stack.init_state` takes.
        """

        def empty(stacks):
            return tuple(stack.take(layers).init_state(*size) for layers in stacks if layers)

        recursions = ([self.shared[i] for i in step] for step in self.steps[:num_recursions])
        return RecursiveState(
            empty([self.first]), tuple(map(empty, recursions)), empty([self.last])
        )

    def bind(
        self, stack: Stack, parent: nn.Module
    ) -> tuple[tuple[Stack, ...], list[tuple[Stack, ...]], tuple[Stack, ...]]:
        """The stacks bound under `parent`: those before the recursions, those of each recursion, and those after.

        A shared stack is one bound module wherever it occurs, so applying it again reuses its parameters.
        """

        bound = {
            name: stack.take(layers).clone(parent=parent, name=name)
            for name, layers in self.stacks.items()
        }
        first, last = ((bound.pop(end),) if end in bound else () for end in ("first", "last"))
        shared = tuple(bound.values())
        return first, [tuple(shared[i] for i in step) for step in self.steps], last


def run(
    stacks: tuple[Stack, ...],
    x,
    *,
    positions,
    segment_ids,
    states=None,
    train=False,
    used: Int[Array, ""] | None = None,
):
    """Applies stacks one after the other. Returns (x, the states of each stack, aux).

    `used`, if given, says at run time how many tokens of a row there are at most; what is behind them has to be
    padding. The stacks are then applied to the shortest of the `FRONTS` of the rows that holds them, and the rest of x
    stays what it is. Without any token the stacks take no time, x and the states (which must be given) stay what they
    are, and aux is zero.
    """
    new_states, reports = [], []
    for i, stack in enumerate(stacks):
        arguments = (x, positions, segment_ids, None if states is None else states[i], train)
        x, state, aux = (
            _apply(stack, *arguments) if used is None else _apply_front(used, stack, *arguments)
        )
        new_states.append(state)
        reports.append(aux)
    return x, tuple(new_states), scalars.combine(reports)


def _apply(stack, x, positions, segment_ids, states, train):
    return stack(x, positions=positions, segment_ids=segment_ids, states=states, train=train)


def _apply_front(used, stack, x, positions, segment_ids, states, train):
    # What the stack would report, by an unbound copy: a bound module cannot be traced just for shapes.
    unbound, variables = stack.unbind()
    _, _, aux = jax.eval_shape(
        lambda: unbound.apply(variables, x, positions, segment_ids, states, train, method=_apply)
    )

    def apply(length, stack, x, states):
        front = np.s_[:, :length]
        tokens = x[front], positions[front], segment_ids[front]
        y, states, reports = _apply(stack, *tokens, states, train)
        return _write(x, y), states, jax.tree.map(_write, nothing(), reports)

    def skip(stack, x, states):
        return x, states, nothing()

    def nothing():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), aux)

    sizes = sorted({math.ceil(front * x.shape[1]) for front in FRONTS})
    branches: list[Callable] = [skip, *(functools.partial(apply, length) for length in sizes)]
    which = jnp.searchsorted(jnp.array([0, *sizes]), used)
    return nn.switch(which, branches, stack, x, states)


def _write(values, front):
    """The values [B, T, ...] with others [B, n, ...] in the place of the first of each row; numbers as they are."""
    return jax.lax.dynamic_update_slice(values, front, (0,) * values.ndim)
