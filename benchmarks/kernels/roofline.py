"""The least time that a chip allows for some work: arithmetic over its peaks, bytes over its bandwidth.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures", CACM
52(4), 2009. One definition for every op: the roof is the highest of memory and of the units that compute, which work
side by side: matrix units, the vector unit, and that of exponentials. Memory is inputs and outputs, each moved once a
pass. A matrix unit is as long busy with a narrow product as with one of its own width, so that its roof is of the
products that the pass consists of, not of their operations. Vector operations are float32.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pallas_kernels import chips


@dataclasses.dataclass(frozen=True)
class Product:
    """[rows, contracted] x [contracted, columns], `times` of them."""

    rows: int
    contracted: int
    columns: int
    times: float = 1


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that one way to do a pass has to do.

    Attributes:
        products: of the matrix units.
        vector_flops: operations that these cannot do: elementwise products and sums.
        exponentials: one each, whatever the base.
    """

    products: tuple[Product, ...] = ()
    vector_flops: float = 0.0
    exponentials: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.vector_flops + other.vector_flops,
            self.exponentials + other.exponentials,
        )

    def times(self, factor: float) -> "Work":
        products = tuple(dataclasses.replace(x, times=x.times * factor) for x in self.products)
        return Work(products, self.vector_flops * factor, self.exponentials * factor)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of a chip.

    Attributes:
        peak_flops: operations a second of the matrix units, bfloat16.
        hbm_bytes_per_second: bandwidth of the memory.
        matrix_units: of the core.
        matrix_width: rows and columns of a matrix unit.
        matrix_rows_per_cycle: rows of the streamed operand that a matrix unit takes in a cycle.
        vector_flops_per_cycle: operations a cycle of the vector unit.
        exponentials_per_cycle: of the unit for transcendental functions.
    """

    peak_flops: float
    hbm_bytes_per_second: float
    matrix_units: int
    matrix_width: int
    matrix_rows_per_cycle: int
    vector_flops_per_cycle: int
    exponentials_per_cycle: int

    @property
    def matmul_flops_per_cycle(self) -> int:
        """Operations a cycle of the matrix units together."""
        return 2 * self.matrix_units * self.matrix_rows_per_cycle * self.matrix_width**2

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak_flops / self.matmul_flops_per_cycle

    def matmul_cycles(self, product: Product) -> float:
        """Of all matrix units together: a tile of one operand lies in a unit, and the rows of the other go through it.

        Rows come in registers of 16 in bfloat16. Either operand can be the one that lies in the unit.
        """

        def rows(streamed: int, lying: int) -> int:
            tiles = math.ceil(product.contracted / width) * math.ceil(lying / width)
            return 16 * math.ceil(streamed / 16) * tiles

        width = self.matrix_width
        least = min(rows(product.rows, product.columns), rows(product.columns, product.rows))
        return least * product.times / (self.matrix_units * self.matrix_rows_per_cycle)


# A vector register has 8 x 128 lanes, and a bundle four vector instructions and one of the transcendental unit: "How to
# Scale Your Model", jax-ml.github.io/scaling-book/tpus, for the first, and the compiler's own capacity line, VALU and
# EUP of `*-final_hlo-static-per-bundle-utilization.txt`, for both, on both chips.
_LANES = 8 * 128
_VECTOR_FLOPS_PER_CYCLE = 4 * _LANES
_EXPONENTIALS_PER_CYCLE = _LANES


def _chip(kind: str, *, matrix_units: int, rows_per_cycle: int) -> Chip:
    facts = chips.CHIPS[kind]
    return Chip(
        facts.peak_flops,
        facts.hbm_bytes_per_second,
        matrix_units,
        facts.matrix_width,
        rows_per_cycle,
        _VECTOR_FLOPS_PER_CYCLE,
        _EXPONENTIALS_PER_CYCLE,
    )


CHIPS = {
    # One row a cycle: in the compiler's schedules 16 rows hold a unit for 16 cycles.
    "v5e": _chip("v5e", matrix_units=4, rows_per_cycle=1),
    # Two rows a cycle: in the compiler's schedules 16 rows hold a unit for 8 cycles.
    "v6e": _chip("v6e", matrix_units=2, rows_per_cycle=2),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least cycles of a pass, and what holds it there.

    Attributes:
        roofs: cycles by name: "matmul", "vector", "exponential" and "memory".
    """

    roofs: Mapping[str, float]

    @property
    def bound(self) -> str:
        """The name of the highest roof."""
        return max(self.roofs, key=self.roofs.get)

    @property
    def cycles(self) -> float:
        """The highest roof."""
        return self.roofs[self.bound]


def roofline(chip: Chip, ways: Sequence[Work], num_bytes: float) -> Roofline:
    """The least cycles of a pass on `chip`.

    Args:
        chip: where.
        ways: to do it (a way for each length of a chunk, say), of which the fastest counts.
        num_bytes: its traffic to HBM, whatever the way.
    """
    return min((_roofline(chip, work, num_bytes) for work in ways), key=lambda x: x.cycles)


def _roofline(chip: Chip, work: Work, num_bytes: float) -> Roofline:
    return Roofline(
        {
            "matmul": sum(map(chip.matmul_cycles, work.products)),
            # An exponential takes a slot of the vector unit, beside the time of its own unit.
            "vector": (work.vector_flops + work.exponentials) / chip.vector_flops_per_cycle,
            "exponential": work.exponentials / chip.exponentials_per_cycle,
            "memory": num_bytes / chip.hbm_bytes_per_second * chip.clock,
        }
    )
