"""Median time of a program on the device at hand."""

import dataclasses
import statistics
import time

import jax

from benchmarks.kernels.case import Case, Contender, flat, out_shape, program, side_by_side

_SECONDS = 1.0
_FEWEST, _MOST = 3, 30


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of `runs` runs."""

    seconds: float
    runs: int


def measure(case: Case, contender: Contender, measured: str, dtype) -> Timing:
    """Compiles a pass, runs it once to warm up, then for about a second.

    Args:
        case: what is computed.
        contender: by what.
        measured: `case.FORWARD` or `case.BOTH`.
        dtype: of the arrays.
    """
    keys = jax.random.split(jax.random.key(0))
    inputs = case.make_inputs(keys[0], dtype)
    out = out_shape(contender, inputs)
    d_out = jax.random.normal(keys[1], out.shape, out.dtype)
    inputs, d_out = flat(case, inputs), side_by_side(d_out)
    run = jax.jit(program(case, contender, measured))
    jax.block_until_ready(run(inputs, d_out))
    seconds = []
    while len(seconds) < _FEWEST or (sum(seconds) < _SECONDS and len(seconds) < _MOST):
        start = time.perf_counter()
        jax.block_until_ready(run(inputs, d_out))
        seconds.append(time.perf_counter() - start)
    return Timing(statistics.median(seconds), len(seconds))
