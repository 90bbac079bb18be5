"""The order of a TPU kernel's program in which independent items fill each other's waits."""

from collections.abc import Callable, Sequence


def pipelined(items: Sequence, *stages: Callable, together: int = 2) -> None:
    """Takes every item through the stages, each of which is given the item and what the stage before returned.

    The compiler keeps the order of products and of what it stores and loads: with stages of neighbours in turn, one
    fills another's waits. Two or more items go `together`, since with products of two kinds in turn each matrix unit
    would get those of one kind; of short ones it takes more to fill a wait.
    """
    passed = {}
    groups = [range(i, min(i + together, len(items))) for i in range(0, len(items), together)]
    for step in range(len(groups) + len(stages) - 1):
        # The later stage first, so that what it took is free.
        for depth, stage in reversed(tuple(enumerate(stages))):
            if 0 <= step - depth < len(groups):
                for i in groups[step - depth]:
                    passed[i] = stage(items[i], passed.get(i))
