"""Pallas kernels of a traced program: what each call of one computes, which a compiled program does not say.

To XLA a kernel is a black box, with the shapes of its operands and results and no cost. Its operations stand in the
program before it is compiled: those of one step of its grid, times the steps.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from effjax.training.planning.hlo import Instruction

TARGET = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Product:
    """[rows, contracted] x [contracted, columns], `times` of them."""

    rows: int
    contracted: int
    columns: int
    times: int

    @property
    def flops(self) -> float:
        """A multiplication and an addition each."""
        return 2.0 * self.rows * self.contracted * self.columns * self.times

    def padded_flops(self, width: int) -> float:
        """Those that a matrix unit of that width does meanwhile: one operand lies in it, padded to the width."""
        contracted = math.ceil(self.contracted / width) * width
        least = min(
            rows * math.ceil(lying / width) * width
            for rows, lying in ((self.rows, self.columns), (self.columns, self.rows))
        )
        return 2.0 * least * contracted * self.times


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a kernel on a device.

    Attributes:
      name: of the kernel.
      results: shapes of its results.
      products: products of matrices in it.
    """

    name: str
    results: tuple[tuple[int, ...], ...]
    products: tuple[Product, ...]

    @property
    def flops(self) -> float:
        """Operations of the matrix units."""
        return sum(product.flops for product in self.products)

    def padded_flops(self, width: int) -> float:
        """Those that matrix units of that width are busy with."""
        return sum(product.padded_flops(width) for product in self.products)


def kernels(jaxpr: Any) -> list[Kernel]:
    """The kernels that a traced program calls, each once for each place where it does."""
    found = []
    for equation in _equations(jaxpr):
        if equation.primitive.name == "pallas_call":
            steps = math.prod(int(size) for size in equation.params["grid_mapping"].grid)
            products = _products(equation.params["jaxpr"], steps)
            results = tuple(tuple(x.aval.shape) for x in equation.outvars)
            found.append(Kernel(_name(equation), results, tuple(products)))
    return found


def of_instruction(known: Iterable[Kernel], instruction: Instruction) -> Kernel | None:
    """The kernel that an instruction of the compiled program is a call of; None if it is none, or an unknown one."""
    if instruction.opcode != "custom-call" or instruction.target != TARGET:
        return None
    results = tuple(shape.dims for shape in instruction.shapes)
    alike = (x for x in known if x.name in instruction.name and x.results == results)
    return max(alike, key=lambda x: len(x.name), default=None)


def _name(equation: Any) -> str:
    named = equation.params.get("name_and_src_info") or equation.params.get("name")
    return str(getattr(named, "name", named)).replace("-", "_")


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, but for those within kernels."""
    for equation in _open(jaxpr).eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    yield from _equations(inner)


def _products(jaxpr: Any, times: int) -> list[Product]:
    """Products in the body of a kernel.

    Of the regions that a body may skip, one does the work of a step: those beside each other count as alternatives, and
    the one with the most operations is taken. A loop without a fixed number of trips counts once.
    """
    found: list[Product] = []
    regions: list[list[Product]] = []
    for equation in _open(jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            found.append(_product(equation, times))
        elif name == "cond":
            regions += [_products(branch, times) for branch in params["branches"]]
        else:
            trips = params["length"] if name == "scan" else 1
            for inner in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    found += _products(inner, times * trips)
    return found + max(regions, key=lambda region: sum(x.flops for x in region), default=[])


def _product(equation: Any, times: int) -> Product:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (x.aval.shape for x in equation.invars)
    inner = math.prod(left[i] for i in contracted)
    outer = math.prod(left[i] for i in batch)
    rows = math.prod(left) // (inner * outer)
    return Product(rows, inner, math.prod(right) // (inner * outer), times * outer)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(_open(x), "eqns")


def _open(x: Any) -> Any:
    return getattr(x, "jaxpr", x)
