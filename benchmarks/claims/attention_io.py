"""The HBM traffic of compiled attention kernels against the law N² d² / M.

Saha and Ye, 2024, arXiv 2402.07443: attention of N tokens and head dimension d on a fast memory of M >= d² numbers
moves Θ(N² d² / M) numbers, which FlashAttention reaches. Here d, N and the tiles are varied, the kernel is compiled for
a TPU, M is the VMEM that the compiler allotted it, and the traffic is what its grid copies beyond reading q, k, v and
writing the result once, which is linear in N and not part of the law.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.claims import copies, plot
from benchmarks.claims.bench import Bench
from benchmarks.claims.claim import Claim, Report, Table, Verdict
from pallas_kernels import attention, topology
from pallas_kernels.blocks import decided_by

CHIP = "v5e"
DTYPE = jnp.bfloat16
# Queries of a tile, which M grows with; keys of a tile, as few as can be.
QUERIES, KEYS = (128, 256, 512, 1024, 2048), 128
LENGTHS, DIMS = (4096, 8192, 16384), (128, 256, 512)


def measure(bench: Bench) -> Report:
    """Compiles every length, dimension and tile that the chip's VMEM can hold, and the unfused baseline."""
    points, refused = [], []
    for length in LENGTHS:
        for dim in DIMS:
            for queries in QUERIES:
                try:
                    found = _copies(length, dim, queries)
                except jax.errors.JaxRuntimeError:  # more VMEM than there is
                    refused.append({"length": length, "dim": dim, "queries": queries})
                    continue
                size = {"length": length, "dim": dim, "queries": queries}
                points.append({**size, **found._asdict(), "law": _law(length, dim, found)})
    return {
        "setting": f"One head of attention (not causal, {jnp.dtype(DTYPE).name}), the forward kernel compiled for a "
        f"{CHIP} that was not here, with tiles of {KEYS} keys and {min(QUERIES)} to {max(QUERIES)} queries; "
        f"{len(refused)} sizes need more VMEM than the kernel may have. Nothing is timed.",
        "points": points,
        "refused": refused,
        "unfused": [{"length": n, "hbm_bytes": _unfused(n, min(DIMS))} for n in LENGTHS],
    }


def _copies(length, dim, queries) -> copies.Copies:
    attend = functools.partial(attention, causal=False, implementation="tpu")
    with decided_by(lambda choice: {"queries": queries, "keys": KEYS}):
        return copies.measure(CHIP, attend, *3 * [_shape(length, dim)])


def _shape(length, dim):
    return jax.ShapeDtypeStruct((1, length, 1, dim), DTYPE)


def _law(length, dim, found) -> float:
    """Numbers that are moved beyond the compulsory ones, over N² d² / M."""
    size = jnp.dtype(DTYPE).itemsize
    moved = (found.hbm_bytes - found.compulsory_bytes) / size
    return moved * (found.vmem_bytes / size) / (length * dim) ** 2


def _unfused(length, dim) -> float:
    """Bytes that XLA's program for attention written out accesses."""

    def written_out(q, k, v):
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)

    compiled = topology.compile_for(CHIP, written_out, *3 * [_shape(length, dim)])
    return compiled.cost_analysis()["bytes accessed"]


def exponents(report: Report) -> dict[str, float]:
    """Of M, N and d in the law that fits the points best: least squares of the logarithms."""
    rows = [
        (math.log(p["vmem_bytes"]), math.log(p["length"]), math.log(p["dim"]), 1.0)
        for p in report["points"]
    ]
    beyond = [math.log(p["hbm_bytes"] - p["compulsory_bytes"]) for p in report["points"]]
    fitted, *_ = np.linalg.lstsq(np.array(rows), np.array(beyond), rcond=None)
    return dict(zip(("M", "N", "d"), map(float, fitted), strict=False))


def verdicts(report: Report) -> list[Verdict]:
    """Of the exponents, of the constant, and of the traffic beside attention written out."""
    fitted = exponents(report)
    expected = {"M": -1, "N": 2, "d": 2}
    constants = [p["law"] for p in report["points"]]
    least = {
        n: min(
            p["hbm_bytes"] for p in report["points"] if (p["length"], p["dim"]) == (n, min(DIMS))
        )
        for n in LENGTHS
    }
    ratios = [row["hbm_bytes"] / least[row["length"]] for row in report["unfused"]]
    return [
        Verdict(
            "traffic goes as M^-1 N^2 d^2, each exponent to 0.25",
            all(abs(fitted[x] - expected[x]) <= 0.25 for x in expected),
            f"fitted M^{fitted['M']:.2f} N^{fitted['N']:.2f} d^{fitted['d']:.2f}",
        ),
        Verdict(
            "traffic is N² d² / M times a constant, the same to a factor of 4 at every size",
            max(constants) <= 4 * min(constants),
            f"the factor is {min(constants):.1f} to {max(constants):.1f}",
        ),
        Verdict(
            "less traffic than attention written out and compiled by XLA, at every length",
            min(ratios) > 1,
            f"{', '.join(f'{x:.0f}' for x in ratios)} times less at N = "
            f"{', '.join(str(row['length']) for row in report['unfused'])}, d = {min(DIMS)} and the best tile",
        ),
    ]


def tables(report: Report) -> list[Table]:
    """A row a size."""
    header = (
        "N, d, queries of a tile",
        "M (VMEM, KiB)",
        "HBM (MB)",
        "once (MB)",
        "moved / (N² d² / M)",
    )
    rows = [
        (
            f"{p['length']}, {p['dim']}, {p['queries']}",
            f"{p['vmem_bytes'] / 1024:,.0f}",
            f"{p['hbm_bytes'] / 1e6:,.1f}",
            f"{p['compulsory_bytes'] / 1e6:,.1f}",
            f"{p['law']:.1f}",
        )
        for p in report["points"]
    ]
    return [Table(header, rows)]


def draw(report: Report, path: Path) -> None:
    """Traffic beyond the compulsory against M, and against N² d² / M."""
    figure, (left, right) = plot.panels(2)
    by_vmem: dict = {}
    by_law: dict = {}
    for p in report["points"]:
        beyond = p["hbm_bytes"] - p["compulsory_bytes"]
        if p["length"] == max(LENGTHS):
            by_vmem.setdefault(f"d = {p['dim']}", []).append((p["vmem_bytes"], beyond))
        law = (p["length"] * p["dim"]) ** 2 / p["vmem_bytes"]
        by_law.setdefault(f"N = {p['length']}", []).append((law, beyond))
    plot.dots(left, by_vmem, f"M, bytes of VMEM (N = {max(LENGTHS)})", "HBM bytes beyond once")
    plot.dots(right, by_law, "N² d² / M", "HBM bytes beyond once")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log")
    plot.save(figure, path)


CLAIM = Claim(
    "The I/O complexity of attention: HBM traffic of N² d² / M for M of fast memory",
    "2402.07443",
    measure,
    verdicts,
    tables,
    draw,
)
