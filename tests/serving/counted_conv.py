"""A mixer that counts how often it is traced and how often it is run."""

import collections

import jax

from effjax.mixers import ShortConv

TRACED, RUN = collections.Counter(), collections.Counter()


class CountedConv(ShortConv):
    """A short convolution that counts under its name.

    Attributes:
      counter: the name.
    """

    counter: str = ""

    def __call__(self, x, **inputs):
        TRACED[self.counter] += 1
        jax.debug.callback(lambda: RUN.update([self.counter]))
        return super().__call__(x, **inputs)


def runs_of(counter: str) -> int:
    """How often that mixer was run, after all that was asked for is done."""
    jax.effects_barrier()
    return RUN[counter]
