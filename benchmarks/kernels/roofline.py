"""The least time that a chip allows for some work: arithmetic over its peaks, bytes over its bandwidth.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures", CACM
52(4), 2009, with a roof for each of the two units that compute, since a matrix unit cannot do what a vector unit does.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a pass has to do.

    Attributes:
        matmul_flops: operations that a matrix unit can do.
        vector_flops: operations that it cannot: elementwise products, sums and exponentials, one each.
    """

    matmul_flops: float = 0.0
    vector_flops: float = 0.0

    def times(self, factor: float) -> "Work":
        return Work(self.matmul_flops * factor, self.vector_flops * factor)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of a chip.

    Attributes:
        peak_flops: operations a second of the matrix units, bfloat16.
        hbm_bytes_per_second: bandwidth of the memory.
        matmul_flops_per_cycle: operations a cycle of the matrix units together.
        vector_flops_per_cycle: operations a cycle of the vector unit.
    """

    peak_flops: float
    hbm_bytes_per_second: float
    matmul_flops_per_cycle: int
    vector_flops_per_cycle: int

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak_flops / self.matmul_flops_per_cycle


# A vector register has 8 x 128 lanes, and a bundle four vector instructions: "How to Scale Your Model",
# jax-ml.github.io/scaling-book/tpus; the compiler's own capacity line says the same of both chips.
_VECTOR_FLOPS_PER_CYCLE = 4 * 8 * 128

CHIPS = {
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s in bfloat16, HBM 819 GB/s, four matrix units, of 128 x 128. One row
    # a cycle: 1.5 GHz.
    "v5e": Chip(197e12, 819e9, 4 * 128 * 128 * 2, _VECTOR_FLOPS_PER_CYCLE),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOP/s in bfloat16, HBM 1640 GB/s, two matrix units, of 256 x 256. Two rows
    # a cycle (in the compiler's schedules 16 rows hold a unit for 8 cycles): 1.75 GHz.
    "v6e": Chip(918e12, 1640e9, 2 * 256 * 256 * 2 * 2, _VECTOR_FLOPS_PER_CYCLE),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least cycles of some work, and what holds it there: "matmul", "vector" or "memory"."""

    cycles: float
    bound: str


def roofline(chip: Chip, work: Work, num_bytes: float) -> Roofline:
    """The least cycles of `work`, with `num_bytes` of traffic to HBM, on `chip`."""
    cycles = {
        "matmul": work.matmul_flops / chip.matmul_flops_per_cycle,
        "vector": work.vector_flops / chip.vector_flops_per_cycle,
        "memory": num_bytes / chip.hbm_bytes_per_second * chip.clock,
    }
    bound = max(cycles, key=cycles.get)
    return Roofline(cycles[bound], bound)
