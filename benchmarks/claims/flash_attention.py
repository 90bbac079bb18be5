"""FlashAttention-2 beside attention written out, and beside an earlier flash kernel, compiled for a TPU.

Dao, 2023, arXiv 2307.08691: memory linear in the length, and about twice the speed of FlashAttention. Here nothing is
timed: memory is what the compiler plans, and speed the cycles of its static schedule (`benchmarks.kernels`), of this
library's kernel and of the flash kernel that comes with JAX.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.claims import plot
from benchmarks.claims.bench import Bench
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from benchmarks.kernels.case import BOTH, FORWARD
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.schedules import Compiler, Job
from benchmarks.kernels.suite import total_cycles
from pallas_kernels import attention, topology

CHIP = "v5e"
DTYPE = jnp.bfloat16
LENGTHS, HEADS, DIM = (1024, 2048, 4096, 8192), 8, 64
KERNEL, PEER = "tpu", "jax flash"


def measure(bench: Bench) -> Report:
    """Compiles forward and backward at each length, and the longer shapes of the kernel benchmark."""
    return {
        "setting": f"Forward and backward of causal attention, {jnp.dtype(DTYPE).name}, compiled for a {CHIP} that was "
        f"not here. Memory: {HEADS} heads of {DIM}. Cycles: shapes [batch, time, heads, head dimension] of "
        "`benchmarks.kernels`. Nothing is timed.",
        "memory": [
            {
                "length": length,
                "flash": _temporary(
                    functools.partial(attention, causal=True, implementation="tpu"), length
                ),
                "written_out": _temporary(_written_out, length),
            }
            for length in LENGTHS
        ],
        "cycles": _cycles(),
    }


def _temporary(attend, length) -> int:
    """Bytes beside arguments and results of the output and the gradients."""

    def both(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    x = jax.ShapeDtypeStruct((1, length, HEADS, DIM), DTYPE)
    return topology.compile_for(CHIP, both, x, x, x, x).memory_analysis().temp_size_in_bytes


def _written_out(q, k, v):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _cycles() -> list[dict]:
    rows = []
    with Compiler() as compiler:
        for case in CASES["attention"](False)[1:]:
            for measured in (FORWARD, BOTH):
                row = {"shape": case.shape, "pass": measured}
                for contender in (KERNEL, PEER):
                    job = Job("attention", case.shape, contender, measured, CHIP)
                    row[contender] = total_cycles(compiler.compile(job)["schedule"])
                rows.append(row)
    return rows


def growth(report: Report, key: str) -> float:
    """The exponent of the length in the temporary memory, from the shortest to the longest."""
    first, *_, last = report["memory"]
    return math.log(last[key] / first[key]) / math.log(last["length"] / first["length"])


def verdicts(report: Report) -> list[Verdict]:
    """Of memory, and of cycles."""
    exponents = {key: growth(report, key) for key in ("flash", "written_out")}
    ratios = [row[PEER] / row[KERNEL] for row in report["cycles"]]
    return [
        Verdict(
            "temporary memory grows with the length to the power of 1 (at most 1.1), that of attention written out to "
            "the power of 2 (at least 1.9)",
            exponents["flash"] <= 1.1 and exponents["written_out"] >= 1.9,
            f"powers {exponents['flash']:.2f} and {exponents['written_out']:.2f}",
        ),
        Verdict(
            "fewer cycles than the flash kernel that comes with JAX, in every shape and pass",
            min(ratios) > 1,
            f"{min(ratios):.2f} to {max(ratios):.2f} times fewer",
        ),
    ]


def tables(report: Report) -> list[Table]:
    """Memory by length, and cycles by shape."""
    memory = [
        (str(row["length"]), *(f"{row[key] / 2**20:,.1f}" for key in ("flash", "written_out")))
        for row in report["memory"]
    ]
    cycles = [
        (f"{row['shape']}, {row['pass']}", *(f"{row[key]:,}" for key in (KERNEL, PEER)))
        for row in report["cycles"]
    ]
    return [
        Table(("length", "temporary memory, flash (MiB)", "written out (MiB)"), memory),
        Table(("shape", "cycles, this kernel", "JAX's flash kernel"), cycles),
    ]


def draw(report: Report, path: Path) -> None:
    """Memory against length, and cycles of the two kernels against each other."""
    figure, (left, right) = plot.panels(2)
    labels = {"flash": "flash", "written_out": "written out"}
    memory = {
        label: [(row["length"], row[key] / 2**20) for row in report["memory"]]
        for key, label in labels.items()
    }
    plot.dots(left, memory, "length", "temporary memory (MiB)")
    left.set(xscale="log", yscale="log")
    cycles = {
        f"{row['shape']}, {row['pass']}": [(row[PEER], row[KERNEL])] for row in report["cycles"]
    }
    plot.dots(right, cycles, "cycles, JAX's flash kernel", "cycles, this kernel")
    most = max(row[PEER] for row in report["cycles"])
    right.plot((0, most), (0, most), color="grey", linewidth=0.8)
    plot.save(figure, path)


CLAIM = Claim(
    "FlashAttention-2: exact attention in memory linear in the length, faster than an earlier flash kernel",
    "2307.08691",
    measure,
    verdicts,
    tables,
    draw,
)
