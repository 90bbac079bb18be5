"""The static schedule of a TPU kernel, read from what the compiler dumps.

A TPU issues one bundle of instructions a cycle where nothing stalls, so that the bundles of a loop's body times its
trips are cycles that need no TPU to be counted. The dump of a kernel is its bundles, one a line: loops and regions that
a branch may skip are marked, and the test that ends a loop holds its bound.

    0xe LB: > { ... }                                     a loop begins; '>' for each loop around a bundle
    0x32   : > { %451 = sbr.rel (%p4) target = $region36 }       a branch over what follows, up to region 36
    0x1b8 PF: > { ... } /* Start/End empty region 36 */
    0x2c89   : > { %p33_p3 = scmp.ge.s32.totalorder %s36_s17, 50 /* loop exit test */ }
    0x2c8c   :  { %35 = sbr.rel (!%p33_p3) target = $region96 }         back to the loop's first bundle

A region is skipped or not by what is known at run time only: the first step of a row clears the sums, a tile on the
diagonal is masked and another is not. Two figures bracket the truth: `step` takes the longest region of those beside
each other, as if they were alternatives, `step_with_all_regions` takes all. In the kernels here one region does the
step's work, so that the first is close and the second far above.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel(?: \(!?(%\w+)\))? target = \$region(\d+)")
_EXIT_TEST = re.compile(
    r"(%\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?(%\w+), (\d+) /\* loop exit test"
)
_ADD = re.compile(r"(%\w+) = sadd\.s32 (?:\(!?%\w+\), )?(\d+), (%\w+)")
_PHI = re.compile(r"(%\w+) = sphi (%\w+), (%\w+)")
_CONSTANT = re.compile(r"(%\w+) = smov(?:\.u32)? (\d+)(?= )")
_WINDOW = re.compile(
    r"operator (?:in|out)put \d+\. The window shape is \w+\[([\d,]*)\], while the full shape is \w+\[([\d,]*)\]"
)
_GRID_LOOP = "iteration index"
# The column of the matrix units: to libtpu 0.0.50, and from 0.0.51.
_MATRIX_COLUMNS = ("MXU", "MATMUL")
# The loop over the grid runs this much longer than the grid: the copies of a step run beside the computation of the one
# before, so that the pipeline has to be filled and drained.
PIPELINE_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stretch of bundles costs.

    Attributes:
        bundles: bundles issued, of regions beside each other those of the longest.
        all_regions: bundles issued if no region is skipped.
        matmul: cycles that the matrix units are held, summed over the units; as `bundles`.
    """

    bundles: int = 0
    all_regions: int = 0
    matmul: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.bundles + other.bundles,
            self.all_regions + other.all_regions,
            self.matmul + other.matmul,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.bundles * times, self.all_regions * times, self.matmul * times)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: the address of its last bundle, its trips where they are in the code, and whether it walks the grid."""

    last: int
    trips: int | None
    is_grid: bool


@dataclasses.dataclass(frozen=True)
class Window:
    """An operand that is copied to VMEM block by block: the shapes of a block and of the whole."""

    block: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Blocks along each axis."""
        return tuple(math.ceil(w / b) for b, w in zip(self.block, self.whole, strict=True))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The schedule of a kernel.

    Attributes:
        name: as in the compiled program.
        around: before and after the loop over the grid.
        step: one step of the grid.
        steps: of the grid; None where it is known at run time only.
        matrix_units: of the core.
        windows: the operands that are copied block by block.
        num_unknown_loops: loops in `step` whose trips are known at run time only, counted once.
    """

    name: str
    around: Cost
    step: Cost
    steps: int | None
    matrix_units: int
    windows: tuple[Window, ...] = ()
    num_unknown_loops: int = 0

    @property
    def cycles(self) -> int | None:
        """Bundles issued by the kernel; None where its steps are not known."""
        return None if self.steps is None else (self.around + self.step * self.steps).bundles

    @property
    def cycles_with_all_regions(self) -> int | None:
        """The same if no region were skipped."""
        return None if self.steps is None else (self.around + self.step * self.steps).all_regions

    @property
    def matmul_utilization(self) -> float:
        """The part of a step in which the matrix units are held, 0 to 1."""
        return self.step.matmul / max(1, self.matrix_units * self.step.bundles)


def read_kernel(name: str, bundles: str, utilization: str) -> Kernel:
    """Reads a kernel's dump.

    Args:
        name: of the kernel.
        bundles: text of its `*-final_bundles.txt`.
        utilization: text of its `*-final_hlo-static-per-bundle-utilization.txt`.
    """
    matrix_units, matmul = _matmul_slots(utilization)
    lines = [line for line in bundles.splitlines() if _BUNDLE.match(line)]
    program = _Program(lines, matmul)
    # The outermost: a loop inside may load, and be marked with, what the compiler spilled of the grid's index.
    grid = min((first for first, loop in program.loops.items() if loop.is_grid), default=None)
    if grid is None:
        around, step, steps = Cost(), program.cost(0, len(lines)), 1
        body = range(len(lines))
    else:
        loop = program.loops[grid]
        around = program.cost(0, grid) + program.cost(loop.last + 1, len(lines))
        step = program.body(grid)
        steps = None if loop.trips is None else max(1, loop.trips - PIPELINE_STEPS)
        body = range(grid + 1, loop.last)
    unknown = [program.loops[at].trips is None for at in body if at in program.loops]
    windows = tuple(
        Window(_shape(block), _shape(whole)) for block, whole in _WINDOW.findall(bundles)
    )
    return Kernel(name, around, step, steps, matrix_units, windows, sum(unknown))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _matmul_slots(utilization: str) -> tuple[int, list[int]]:
    """The number of matrix units, and how many are held in each bundle."""
    lines = iter(utilization.splitlines())
    names = next(line for line in lines if "VALU" in line).split(", ")
    column = next(names.index(name) for name in _MATRIX_COLUMNS if name in names)
    capacity = next(lines).split()
    next(line for line in lines if "UTILIZATION" in line)
    return int(capacity[column]), [int(line.split()[column]) for line in lines if line.strip()]


class _Program:
    """Bundles in order, with where loops and regions begin and end."""

    def __init__(self, lines: list[str], matmul: list[int]):
        self._matmul = matmul + [0] * (len(lines) - len(matmul))
        starts = {}
        for address, line in enumerate(lines):
            for region in _REGION.findall(line):
                starts.setdefault(region, address)
        self.loops: dict[int, Loop] = {}
        self._skips: dict[int, int] = {}
        counters = _Counters(lines)
        for address, line in enumerate(lines):
            for predicate, region in _BRANCH.findall(line):
                # An empty region at the very end has no mark.
                target = starts.get(region, len(lines))
                if target > address:
                    self._skips[address] = target
                else:
                    is_grid = _GRID_LOOP in lines[target]
                    self.loops[target] = Loop(address, counters.trips(predicate), is_grid)

    def cost(self, low: int, high: int) -> Cost:
        """Of the bundles from `low` up to `high`."""
        total, regions = Cost(), [Cost()]
        address = low
        while address < high:
            loop, skip = self.loops.get(address), self._skips.get(address, high + 1)
            if loop is not None and loop.last < high:
                total += self.body(address) * (1 if loop.trips is None else loop.trips)
                address = loop.last + 1
                continue
            total += self._bundle(address)
            if skip <= high:
                regions.append(self.cost(address + 1, skip))
                address = skip
            else:
                address += 1
        longest = max(regions, key=lambda region: region.bundles)
        everything = sum(region.all_regions for region in regions)
        return total + dataclasses.replace(longest, all_regions=everything)

    def body(self, first: int) -> Cost:
        """Of one trip of the loop that begins at `first`."""
        return self._bundle(first) + self.cost(first + 1, self.loops[first].last + 1)

    def _bundle(self, address: int) -> Cost:
        return Cost(1, 1, self._matmul[address])


class _Counters:
    """How often loops run, from the scalar instructions that count."""

    def __init__(self, lines: Iterable[str]):
        text = "\n".join(lines)
        self._tests = {p: (counter, int(bound)) for p, counter, bound in _EXIT_TEST.findall(text)}
        self._adds = {out: (int(step), before) for out, step, before in _ADD.findall(text)}
        self._phis = {out: first for out, first, _ in _PHI.findall(text)}
        self._constants = {out: int(value) for out, value in _CONSTANT.findall(text)}

    def trips(self, predicate: str) -> int | None:
        """Trips of the loop that ends when `predicate` holds, or None where its bound is no constant.

        A counter whose start or step is not in sight starts at 0 and goes by 1.
        """
        if predicate not in self._tests:
            return None
        counter, bound = self._tests[predicate]
        step, before = self._adds.get(counter, (1, None))
        start = self._constants.get(self._phis.get(before), 0)
        return math.ceil((bound - start) / step)
