"""The memory traffic of softmax in two passes, which needs no maximum first.

Dukhan and Ablavatski, 2020, arXiv 2001.04438, section 5: three passes read the input three times and write the output
once, or more, two passes read it twice and write once: 3/4 of the traffic, and on a CPU, out of its caches, up to 28 %
more speed. Counted here are the bytes of programs compiled for a TPU; and the passes are timed on this machine.
"""

import functools
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.claims import copies, plot
from benchmarks.claims.bench import Bench
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from pallas_kernels import softmax, topology

CHIP = "v5e"
DTYPE = jnp.float32
# The last have rows of which the fewest that a block may hold do not fit into VMEM.
SHAPES = ((1024, 32_768), (256, 262_144), (64, 1_048_576))
# Out of the caches of a CPU: 256 MB.
TIMED, ROUNDS = (64, 1_048_576), 9


def measure(bench: Bench) -> Report:
    """Counts bytes, for a TPU, and times, here."""
    kernel = functools.partial(softmax, implementation="tpu")
    rows = []
    for shape in SHAPES:
        x = jax.ShapeDtypeStruct(shape, DTYPE)
        compiled = topology.compile_for(CHIP, jax.nn.softmax, x)
        row = {"shape": shape, "two_pass": copies.measure(CHIP, kernel, x).hbm_bytes}
        rows.append(row | {"xla": compiled.cost_analysis()["bytes accessed"]})
    return {
        "setting": f"Rows of {jnp.dtype(DTYPE).name}; bytes of programs compiled for a {CHIP} that was not here: the "
        "two-pass kernel by the copies of its grid, and `jax.nn.softmax` by the count of XLA, the compiler; seconds of "
        f"{TIMED[0]} rows of {TIMED[1]:,} on {jax.devices()[0].device_kind}, in turn, {ROUNDS} rounds.",
        "bytes": rows,
        "seconds": _timed(),
    }


def _timed() -> dict[str, list[float]]:
    x = jax.random.normal(jax.random.key(0), TIMED, DTYPE)
    programs = {
        "two_pass": jax.jit(functools.partial(softmax, implementation="xla")),
        "xla": jax.jit(jax.nn.softmax),
    }
    found = {name: [] for name in programs}
    for number in range(ROUNDS + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x))
            if number:  # the first compiles
                found[name].append(time.perf_counter() - start)
    return found


def verdicts(report: Report) -> list[Verdict]:
    """Of bytes, and of time."""
    row = report["bytes"][-1]
    times = [row[name] / _once(row) for name in ("two_pass", "xla")]
    seconds = report["seconds"]
    faster = statistics.median(
        x / y for x, y in zip(seconds["xla"], seconds["two_pass"], strict=True)
    )
    return [
        Verdict(
            "where a row does not fit into VMEM, the input is read twice and the output written once, and a program "
            "with a pass for the maximum moves more",
            round(times[0], 2) == 3 and times[1] > times[0],
            f"{times[0]:.2f} times the bytes of the input, `jax.nn.softmax` {times[1]:.2f}",
        ),
        Verdict(
            "out of the caches of a CPU, faster than `jax.nn.softmax` (median of the ratios)",
            faster > 1,
            f"{faster:.2f} times as fast",
        ),
    ]


def _once(row) -> int:
    return math.prod(row["shape"]) * jnp.dtype(DTYPE).itemsize


def tables(report: Report) -> list[Table]:
    """Bytes by shape."""
    rows = [
        (
            " x ".join(f"{n:,}" for n in row["shape"]),
            *(f"{row[name] / _once(row):.2f}" for name in ("two_pass", "xla")),
        )
        for row in report["bytes"]
    ]
    return [Table(("rows x columns", "two-pass kernel, bytes / input", "`jax.nn.softmax`"), rows)]


def draw(report: Report, path: Path) -> None:
    """Bytes over those of the input, by the length of a row; and seconds."""
    figure, (left, right) = plot.panels(2)
    labels = {"two_pass": "two-pass", "xla": "jax.nn.softmax"}
    ratios = {
        label: [(row["shape"][1], row[name] / _once(row)) for row in report["bytes"]]
        for name, label in labels.items()
    }
    plot.dots(left, ratios, "columns", "HBM bytes / bytes of the input")
    left.set(xscale="log", ylim=(0, None))
    seconds = {
        label: list(enumerate(report["seconds"][name], start=1)) for name, label in labels.items()
    }
    plot.dots(right, seconds, "round", "seconds on a CPU")
    right.set_ylim(0, None)
    plot.save(figure, path)


CLAIM = Claim(
    "The two-pass softmax: two reads and a write instead of a third pass for the maximum",
    "2001.04438",
    measure,
    verdicts,
    tables,
    draw,
)
