"""The order of a TPU kernel's program in which independent items fill each other's waits."""

import itertools
from collections.abc import Callable, Sequence


def pipelined(
    items: Sequence, *stages: Callable, together: int = 2, first: int | None = None
) -> None:
    """Takes every item through the stages, each of which is given the item and what the stage before returned.

    The compiler keeps the order of products and of what it stores and loads: with stages of neighbours in turn, one
    fills another's waits. Two or more items go `together`, since with products of two kinds in turn each matrix unit
    would get those of one kind; of short ones it takes more to fill a wait. The `first` to go may be fewer, as nothing
    can fill their waits: the next begin sooner. Or more, where they fill each other's.
    """
    passed = {}
    starts = [0, *range(first or together, len(items), together)]
    groups = [range(*ends) for ends in itertools.pairwise([*starts, len(items)])]
    for step in range(len(groups) + len(stages) - 1):
        # The later stage first, so that what it took is free.
        for depth, stage in reversed(tuple(enumerate(stages))):
            if 0 <= step - depth < len(groups):
                for i in groups[step - depth]:
                    passed[i] = stage(items[i], passed.get(i))
