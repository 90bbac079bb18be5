"""What a pass costs with given block sizes: cycles on a TPU that is not here, or seconds on the device that is."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import Case, Contender, num_bytes, out_shape, program, shapes
from benchmarks.kernels.roofline import CHIPS, roofline
from benchmarks.kernels.schedules import Compiler, Job
from benchmarks.kernels.suite import total_cycles
from benchmarks.kernels.timing import measure
from pallas_kernels import topology
from pallas_kernels.blocks import Choice, Sizes, decided_by
from pallas_kernels.dispatch import Target, target

_DTYPE = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, and how costs on it come about.

    Attributes:
        name: as the user says.
        target: what programs are traced for.
        unit: of a cost.
        mesh: makes the context in which programs are traced for it.
        cost: (case, contender, pass, sizes by the name of their choice) -> the cost of the pass.
        least: (case, pass) -> the cost below which nothing counts as a gain.
    """

    name: str
    target: Target
    unit: str
    mesh: Callable[[], contextlib.AbstractContextManager]
    cost: Callable[[Case, Contender, str, Mapping[str, Sizes]], float]
    least: Callable[[Case, str], float]

    def kernels(self, case: Case) -> list[Contender]:
        """Our kernels for the device."""
        platforms = (self.target.platform,)
        return [x for x in case.contenders if not x.is_peer and x.platforms == platforms]

    def choices(self, case: Case, contender: Contender) -> dict[str, Choice]:
        """What sizes a contender chooses in a case, by name."""
        found, inputs = {}, shapes(case, _DTYPE)

        def remember(choice: Choice) -> None:
            found[choice.name] = choice

        with self.mesh(), decided_by(remember):
            d_out = out_shape(contender, inputs)
            for measured in case.work:
                jax.eval_shape(program(case, contender, measured), inputs, d_out)
        return found


def absent(chip: str, compiler: Compiler) -> Device:
    """A TPU that is not here: the cycles of the schedules.

    These do not see the memory, so that below the roofline, where memory holds a pass, fewer are no gain.
    """
    mesh = topology.mesh(chip)

    def cost(case, contender, measured, sizes) -> float:
        answer = compiler.compile(
            Job(case.op, case.shape, contender.name, measured, chip, dict(sizes))
        )
        if "error" in answer:
            raise ValueError(answer["error"])
        return total_cycles(answer["schedule"])

    def least(case, measured) -> float:
        work, traffic = case.work[measured], num_bytes(case, measured, _DTYPE)
        return roofline(CHIPS[chip], work, traffic).cycles

    with jax.set_mesh(mesh):
        found = target()
    return Device(chip, found, "cycles", lambda: jax.set_mesh(mesh), cost, least)


def present() -> Device:
    """The device at hand: median seconds."""

    def cost(case, contender, measured, sizes) -> float:
        with decided_by(lambda choice: sizes.get(choice.name, choice.by_rule)):
            return measure(case, contender, measured, _DTYPE).seconds

    found = target()
    return Device(
        found.device_kind, found, "s", contextlib.nullcontext, cost, lambda case, measured: 0.0
    )
