"""Which layers of a dense model the shared blocks of a recursive one begin as."""

import numpy as np

from effjax.depth.sharing import Layout
from effjax.registry import unknown

INITIALISATIONS = ("stepwise", "average", "lower", "upper")


def tied_layers(layout: Layout, initialisation: str) -> tuple[tuple[int, ...], ...]:
    """For each unique block of the shared stacks, in order, the layers of which it begins as the mean.

    The initialisations of Relaxed Recursive Transformers (Bae et al., 2024, arXiv 2410.20672, section 2.3; "upper" and
    the use with all strategies of sharing are those of Mixture-of-Recursions, arXiv 2507.10524, in the authors' code).
    With K unique blocks for the layers a to b:

      stepwise: K layers at even intervals from a to b, both of these among them.
      average: the mean of all layers that the block stands for.
      lower: a, ..., a + K - 1.
      upper: b - K + 1, ..., b.

    The first and the last layer of "middle" strategies stay what they are. For 8 layers, "middle_cycle" and three
    recursions (a=1, b=6, K=2) that is ((1,), (6,)), ((1, 3, 5), (2, 4, 6)), ((1,), (2,)) and ((5,), (6,)).

    Raises:
      ValueError: for an unknown initialisation.
    """
    unique = [layer for layers in layout.shared for layer in layers]
    begin, end = len(layout.first), len(layout.layers) - len(layout.last)
    if initialisation == "stepwise":
        # Halves go to the even layer, as in the authors' code.
        return tuple((int(i),) for i in np.rint(np.linspace(begin, end - 1, len(unique))))
    if initialisation == "average":
        return tuple(
            tuple(layer for layer, used in enumerate(layout.layers) if used == block)
            for block in unique
        )
    if initialisation in ("lower", "upper"):
        begin = begin if initialisation == "lower" else end - len(unique)
        return tuple((begin + i,) for i in range(len(unique)))
    raise ValueError(unknown("initialisation", initialisation, INITIALISATIONS))
