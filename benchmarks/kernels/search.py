"""The search for block sizes: from what the rule says, one size at a time, twice and half as large while it gains."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pallas_kernels.blocks import Choice, Sizes

# The part of the cost that a change has to save: below it two schedules are as good, and the rule is simpler.
GAIN = 0.01


class Found(NamedTuple):
    """Sizes by the names of their choices, and what they cost."""

    sizes: Mapping[str, Sizes]
    cost: float


def search(choices: Mapping[str, Choice], cost: Callable[[dict[str, Sizes]], float]) -> Found:
    """Sizes of a program's kernels with a low cost, found by descent along one coordinate after the other.

    Costs have few minima in powers of two: a larger block amortises more until it no longer fits. So a few programs
    per size are enough, where a grid of all would be hundreds.

    Args:
        choices: what there is to choose, by name.
        cost: of a program with these sizes; infinite where it cannot be.
    """
    best = {name: choice.by_rule for name, choice in choices.items()}
    least, gained = cost(best), True
    while gained:
        gained = False
        for name, choice in choices.items():
            for size in choice.table.sizes:
                for change in (_twice, _half):
                    line = list(_descend(Found(best, least), name, choice, size, change, cost))
                    if line:
                        best, least = line[-1]
                        gained = True
                        break
    return Found(best, least)


def _descend(found: Found, name: str, choice: Choice, size: str, change, cost) -> Iterator[Found]:
    """Ever better sizes from changing one of a choice again and again."""
    while True:
        before = found.sizes[name]
        sizes = before | {size: change(before[size])}
        if sizes[size] < 1 or choice.table.flaw(sizes, choice.shape) is not None:
            return
        changed = found.sizes | {name: sizes}
        price = cost(changed)
        if price > found.cost * (1 - GAIN):
            return
        found = Found(changed, price)
        yield found


def _twice(size: int) -> int:
    return size * 2


def _half(size: int) -> int:
    return size // 2
