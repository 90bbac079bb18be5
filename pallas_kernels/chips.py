"""What chips can do, as their makers say: the facts that rooflines and plans are made of."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts of a chip.

    Attributes:
        peak_flops: operations a second in bfloat16 with float32 sums, dense.
        clock: cycles a second at that peak.
        hbm_bytes: memory that a program may use, which is less than is soldered on.
        hbm_bytes_per_second: bandwidth of the memory.
        matrix_width: rows and columns of a matrix unit: narrower products keep it busy as long as these.
        link_bytes_per_second: of one link to a neighbour, in one direction.
        wraps_at: a row of so many chips, or of a multiple of them, is closed to a ring; None: there is a switch, and
            any chip of a host reaches any other at `link_bytes_per_second`.
        host_bytes_per_second: to chips of other hosts, in one direction, where no links lead there; None: they do.
    """

    peak_flops: float
    clock: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    matrix_width: int
    link_bytes_per_second: float
    wraps_at: int | None
    host_bytes_per_second: float | None


def matrix_width(device_kind: str) -> int:
    """Rows and columns of a matrix unit of the TPU that `jax.Device.device_kind` names."""
    return 256 if "v6" in device_kind or "v7" in device_kind else 128


def num_cores(device_kind: str) -> int:
    """Cores that share the parallel axes of a grid on the TPU that `jax.Device.device_kind` names.

    On other chips than these, of v4 and v5p, a device has one.
    """
    return 2 if device_kind in ("TPU v4", "TPU v5") else 1


def has_bfloat16_vectors(device_kind: str) -> bool:
    """Whether the vector unit of the TPU that `jax.Device.device_kind` names multiplies bfloat16: from v6e on.

    Where there is no TPU, as in an interpreter, that of the newest counts.
    """
    return not re.match(r"TPU v[2-5]", device_kind)


_GIB = 2.0**30

# TPUs: peak and bandwidth of the memory from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; links from the table in "How
# to Scale Your Model", jax-ml.github.io/scaling-book/tpus: what they reach, a tenth below the data sheet. Clocks are
# the peak over the operations a cycle of the matrix units: two cores of four 128 x 128 (v4, v5p), one core of four
# (v5e), one of two 256 x 256 that take two rows a cycle (v6e). Memory is what the compiler lets a program use. Rows of
# chips: v4 and v5p are built from cubes of 4 x 4 x 4 that optical switches close, v5e and v6e close rows of 16. All
# chips of a topology are linked: there is no network of hosts between them.
CHIPS = {
    "v4": Chip(275e12, 1.05e9, 30.75 * _GIB, 1228e9, 128, 45e9, 4, None),
    "v5e": Chip(197e12, 1.5e9, 15.75 * _GIB, 819e9, 128, 45e9, 16, None),
    "v5p": Chip(459e12, 1.75e9, 95.74 * _GIB, 2765e9, 128, 90e9, 4, None),
    "v6e": Chip(918e12, 1.75e9, 31.25 * _GIB, 1640e9, 256, 90e9, 16, None),
    # NVIDIA H100 SXM5: the data sheet (989.4 TFLOP/s dense, NVLink 900 GB/s both ways); memory and clock from
    # `gpu_targets/h100.txtpb`. Between hosts a network card of 400 Gb/s a GPU, as in a DGX H100.
    "h100": Chip(989.4e12, 1.98e9, 84942979072, 3352e9, 64, 450e9, None, 50e9),
}
