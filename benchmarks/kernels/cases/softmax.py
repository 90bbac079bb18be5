"""Softmax beside `jax.nn.softmax`, cross-entropies beside optax."""

import jax
import optax

from benchmarks.kernels.case import BOTH, FORWARD, Case, Contender, implementations
from benchmarks.kernels.roofline import Product, Work
from pallas_kernels import OPS, cross_entropy, linear_cross_entropy, softmax


def softmax_cases(quick: bool) -> list[Case]:
    """Rows of a small and of a usual vocabulary."""
    return [_softmax_case(*shape) for shape in _logits(quick)]


def cross_entropy_cases(quick: bool) -> list[Case]:
    """Logits over a small and a usual vocabulary."""
    return [_cross_entropy_case(*shape) for shape in _logits(quick)]


def linear_cross_entropy_cases(quick: bool) -> list[Case]:
    """The head of a small model, over a small and a usual vocabulary."""
    shapes = [(512, 256, 4096), (1024, 256, 32768)]
    return [_linear_cross_entropy_case(*shape) for shape in shapes[: 1 if quick else None]]


def _logits(quick: bool) -> list[tuple[int, int]]:
    return [(512, 4096), (512, 32768)][: 1 if quick else None]


def _softmax_case(rows: int, columns: int) -> Case:
    # Of an entry: exp, a sum and a product; backward, two products, a sum and a difference.
    entries = rows * columns
    forward = Work(vector_flops=2 * entries, exponentials=entries)
    both = forward + Work(vector_flops=4 * entries)
    return Case(
        op="softmax",
        shape=f"[{rows}, {columns}]",
        make_inputs=lambda key, dtype: {"x": jax.random.normal(key, (rows, columns), dtype)},
        contenders=(
            *implementations(softmax, OPS["softmax"]),
            Contender("jax.nn", jax.nn.softmax, has_schedule=True),
        ),
        work={FORWARD: (forward,), BOTH: (both,)},
    )


def _cross_entropy_case(rows: int, columns: int) -> Case:
    def make_inputs(key, dtype):
        keys = jax.random.split(key, 2)
        return {
            "logits": jax.random.normal(keys[0], (rows, columns), dtype),
            "labels": jax.random.randint(keys[1], (rows,), 0, columns),
        }

    # Of an entry: exp and a sum; backward, exp, a difference and a product.
    entries = rows * columns
    forward = Work(vector_flops=entries, exponentials=entries)
    both = forward + Work(vector_flops=2 * entries, exponentials=entries)
    return Case(
        op="cross_entropy",
        shape=f"[{rows}, {columns}]",
        make_inputs=make_inputs,
        contenders=(
            *implementations(_loss(cross_entropy), OPS["cross_entropy"]),
            Contender("optax", optax.softmax_cross_entropy_with_integer_labels, has_schedule=True),
        ),
        work={FORWARD: (forward,), BOTH: (both,)},
    )


def _linear_cross_entropy_case(rows: int, width: int, columns: int) -> Case:
    def make_inputs(key, dtype):
        keys = jax.random.split(key, 3)
        return {
            "hidden": jax.random.normal(keys[0], (rows, width), dtype),
            "weight": jax.random.normal(keys[1], (width, columns), dtype) * width**-0.5,
            "labels": jax.random.randint(keys[2], (rows,), 0, columns),
        }

    def logits_and_loss(hidden, weight, labels):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, labels)

    # Forward, the logits, and of one exp and a sum; backward, of one exp, a difference and a product, and the gradients
    # of both factors.
    entries = rows * columns
    forward = Work((Product(rows, width, columns),), entries, entries)
    gradients = Product(rows, columns, width), Product(width, rows, columns)
    both = forward + Work(gradients, 2 * entries, entries)
    return Case(
        op="linear_cross_entropy",
        shape=f"[{rows}, {width}] x [{width}, {columns}]",
        make_inputs=make_inputs,
        contenders=(
            *implementations(_loss(linear_cross_entropy), OPS["linear_cross_entropy"]),
            Contender("optax", logits_and_loss),
        ),
        work={FORWARD: (forward,), BOTH: (both,)},
    )


def _loss(function):
    """Without the log-sum-exp."""
    return lambda *arrays, **named: function(*arrays, **named)[0]
