"""A plan: what one step of a config needs and takes on a machine that need not be here.

The real step is compiled by the real compiler for that machine, and everything is read from what comes out, so that a
plan is of the program that a run would use.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from effjax.training.planning import (
    arithmetic,
    collectives,
    kernels,
    memory,
    timeline,
    transfers,
)
from effjax.training.planning.hlo import Program
from pallas_kernels.chips import Chip

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a chip does in one step.

    Attributes:
      matmul_flops: operations of its matrix units: products, those in kernels and those that are repeated included.
      memory_bytes: traffic to its memory.
      network_bytes: what it receives from other chips.
      to_host_bytes: what it copies to the memory of its host.
      from_host_bytes: what it copies from there.
      collectives: rows of `kind`, `axes` (of the mesh), `times`, `bytes` received and `seconds` at least.
      unknown_loops: loops that only the run time knows the trips of, which count once.
      unknown_kernels: calls of Pallas kernels that the traced program does not have, whose operations do not count.
    """

    matmul_flops: float
    memory_bytes: float
    network_bytes: float
    to_host_bytes: float
    from_host_bytes: float
    collectives: list[dict[str, Any]]
    unknown_loops: int
    unknown_kernels: int


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast a machine is.

    Attributes:
      roofs: seconds that a step takes at least, by what holds it: "matrix units", "memory", "network" and "host link".
      times: seconds of a step by what they are spent on.
      seconds: their sum.
      utilization: model FLOPs utilisation: the operations that the model needs over those that the chips could do.
      tokens_per_second: of the whole machine.
    """

    roofs: dict[str, float]
    times: timeline.Times
    seconds: float
    utilization: float
    tokens_per_second: float

    @property
    def is_estimate(self) -> bool:
        """Whether the compiler estimates its operations, as that for TPU does; else a step takes at least `seconds`."""
        return self.times.estimated > 0

    @property
    def bound(self) -> str:
        """What a step spends most of its time on, and how much of it."""
        parts = self.times.parts
        longest = max(parts, key=parts.get)
        return f"{longest} ({100 * parts[longest] / self.seconds:.0f} % of a step)"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a config needs and takes on a machine.

    Attributes:
      what: "training step" or "decoding step".
      model: name of the model.
      topology: the machine.
      num_chips: of the machine.
      mesh: sizes of the mesh axes.
      settings: of the config, that a search may change, and the sizes of a batch.
      memory: on each chip.
      model_flops: operations that the model needs for a step, on all chips together.
      tokens: of a step.
      compile_seconds: what compiling took here.
      work: of each chip; None if the compiler refuses a step that does not fit.
      pace: None of a step that does not fit, or where the chip is not known.
      training_tokens: of the whole run; None of a decoding step.
    """

    what: str
    model: str
    topology: str
    num_chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    memory: memory.Memory
    model_flops: float
    tokens: int
    compile_seconds: float
    work: Work | None
    pace: Pace | None
    training_tokens: float | None

    @property
    def chip_hours(self) -> float | None:
        """Of the whole run, evaluation and checkpoints not counted."""
        if self.pace is None or self.training_tokens is None:
            return None
        return self.training_tokens / self.pace.tokens_per_second * self.num_chips / 3600

    @property
    def tokens_per_day(self) -> float | None:
        """Of the whole machine."""
        return None if self.pace is None else self.pace.tokens_per_second * DAY

    @property
    def verdict(self) -> str:
        """Whether it fits, how fast it is and what holds it, in a line."""
        gib = f"{self.memory.total / 2**30:.1f}"
        if self.memory.capacity is not None:
            gib += f" of {self.memory.capacity / 2**30:.1f}"
        if not self.memory.fits:
            return f"does not fit: {gib} GiB a chip"
        if self.pace is None:
            return f"fits: {gib} GiB a chip"
        pace, least = self.pace, "" if self.pace.is_estimate else "at least "
        return (
            f"fits: {gib} GiB a chip; {least}{1000 * pace.seconds:.4g} ms a step, "
            f"{pace.tokens_per_second:,.0f} tokens/s, {100 * pace.utilization:.1f} % of the chips' peak; "
            f"most goes to {pace.bound}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        derived = {
            "verdict": self.verdict,
            "chip_hours": self.chip_hours,
            "tokens_per_day": self.tokens_per_day,
            "bound": self.pace.bound if self.pace else None,
            "fits": self.memory.fits,
        }
        return derived | dataclasses.asdict(self)


def compile_or_refuse(traced: Any, params: Any, opt_state: Any) -> Any:
    """The compiled program; or, where the compiler says that it does not fit, the memory that it would take."""
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = memory.of_failure(error, params, opt_state)
        if found is None:
            raise
        return found


def of_program(
    compiled: Any,
    traced: Any,
    *,
    mesh: Mesh,
    chip: Chip | None,
    host_link: float | None,
    params: Any,
    opt_state: Any,
    flops: float,
    tokens: int,
    schedules: Path | None,
    **facts: Any,
) -> Plan:
    """The plan that a compiled program comes to.

    Args:
      compiled: the program, or the `memory.Memory` of one that does not fit.
      traced: what it was compiled from.
      mesh: its devices.
      chip: their kind.
      host_link: as `timeline.play` takes it; None with a chip that is not known.
      params: types of the parameters, with shardings.
      opt_state: of the optimizer's state, or None.
      flops: operations that the model needs for a step.
      tokens: of a step.
      schedules: where the compiler has left the schedules of the program's kernels, if it was told to.
      **facts: further attributes of the plan.
    """
    work = pace = None
    if isinstance(compiled, memory.Memory):
        used = compiled
    else:
        used = memory.of_program(compiled, params, opt_state, chip and chip.hbm_bytes)
        program, network = Program(compiled.as_text()), collectives.Network(mesh, chip)
        known = kernels.kernels(traced.jaxpr)
        work = _work(program, network, known)
        if chip is not None:
            times = timeline.play(program, chip, host_link, network, known, schedules)
            pace = _pace(work, times, chip, host_link, flops, tokens, mesh.size)
    return Plan(
        num_chips=mesh.size,
        mesh=dict(mesh.shape),
        memory=used,
        model_flops=flops,
        tokens=tokens,
        work=work,
        pace=pace,
        **facts,
    )


def _work(program: Program, network: collectives.Network, known: Sequence[kernels.Kernel]) -> Work:
    flops = traffic = to_host = from_host = 0.0
    unknown = 0
    for run in program.runs():
        kernel = kernels.of_instruction(known, run.instruction)
        if kernel is not None:
            flops += kernel.flops * run.times
        else:
            flops += arithmetic.matmul_flops(run.instruction, run.computation) * run.times
            unknown += run.instruction.target == kernels.TARGET
        if not run.is_fused:
            traffic += run.times * arithmetic.memory_bytes(
                run.instruction, run.computation, program
            )
            copy = transfers.transfer(run.instruction, run.computation, program)
            # What a whole asynchronous computation copies counts where it does so.
            if copy is not None and run.instruction.opcode != "async-start":
                to_host += run.times * copy.num_bytes * copy.to_host
                from_host += run.times * copy.num_bytes * copy.from_host
    exchanged = collectives.total(program, network)
    return Work(
        matmul_flops=flops,
        memory_bytes=traffic,
        network_bytes=sum(row["bytes"] for row in exchanged),
        to_host_bytes=to_host,
        from_host_bytes=from_host,
        collectives=exchanged,
        unknown_loops=len(program.unknown_loops),
        unknown_kernels=unknown,
    )


def _pace(
    work: Work,
    times: timeline.Times,
    chip: Chip,
    host_link: float,
    flops: float,
    tokens: int,
    num_chips: int,
) -> Pace:
    roofs = {
        "matrix units": work.matmul_flops / chip.peak_flops,
        "memory": work.memory_bytes / chip.hbm_bytes_per_second,
        "network": sum(row["seconds"] for row in work.collectives),
        "host link": max(work.to_host_bytes, work.from_host_bytes) / host_link,
    }
    seconds = times.total
    return Pace(
        roofs=roofs,
        times=times,
        seconds=seconds,
        utilization=flops / (seconds * num_chips * chip.peak_flops),
        tokens_per_second=tokens / seconds,
    )
