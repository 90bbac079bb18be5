"""How long a compiled program takes: its schedule, played through with the compiler's own estimates.

The instructions of a compiled program stand in the order in which they run. Each takes

- the cycles that the compiler estimates for it: XLA's compiler for TPU notes them on what it makes itself;
- for a Pallas kernel the cycles of its schedule (`schedules`), or its operands and results at the memory's bandwidth;
  where there is no schedule, its operations, padded to the width of a matrix unit, at peak: it cannot be faster;
- for all else its operations at peak, or its operands and results at the memory's bandwidth.

What is begun in one place (`all-gather-start`) and awaited in another (`all-gather-done`) runs beside what stands
between: a wait takes only what is left. Communication is as fast as the links allow (`collectives`), copies to the
memory of the host and back (`transfers`) as the link to it does. Two exchanges do not run at once, nor do two copies
within the chip, two to its host, or two from there.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from effjax.training.planning import arithmetic, collectives, schedules, transfers
from effjax.training.planning.collectives import Network
from effjax.training.planning.hlo import Computation, Instruction, Program, Run
from effjax.training.planning.kernels import Kernel, of_instruction
from pallas_kernels.chips import Chip

# What runs beside the cores, each lane one thing at a time, and the field of `Times` that a wait for it counts in.
_LANES = {"links": "network", "copies": "copies", "to the host": "host", "from the host": "host"}


@dataclasses.dataclass
class Times:
    """Seconds of one call of a program on each chip.

    Attributes:
      products: of operations with a product of matrices in them.
      between: of all other operations: norms, activations, changes of layout, the optimizer.
      kernels: of Pallas kernels.
      network: waits for other chips.
      copies: waits for copies within the chip.
      host: waits for copies to the memory of the host, and from there.
      estimated: what of these the compiler has estimated; the rest is what they take at least.
    """

    products: float = 0.0
    between: float = 0.0
    kernels: float = 0.0
    network: float = 0.0
    copies: float = 0.0
    host: float = 0.0
    estimated: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by what they are spent on, in words; they follow each other."""
        return {
            "products of matrices": self.products,
            "operations between them": self.between,
            "kernels": self.kernels,
            "waiting for chips": self.network,
            "waiting for copies": self.copies,
            "waiting for the host's memory": self.host,
        }

    @property
    def total(self) -> float:
        """The whole call."""
        return sum(self.parts.values())

    def add(self, other: "Times", factor: float = 1.0) -> None:
        """Adds `factor` times another."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name) + factor * getattr(other, field.name)
            setattr(self, field.name, value)


def play(
    program: Program,
    chip: Chip,
    host_link: float,
    network: Network,
    kernels: Sequence[Kernel],
    folder: Path | None = None,
) -> Times:
    """The times of a program on a chip.

    Args:
      program: the compiled program.
      chip: what it runs on.
      host_link: bytes a second to the memory of its host, and as many from there.
      network: what lies between the chips.
      kernels: those that it calls.
      folder: where the compiler has left their schedules.
    """
    return _Player(program, chip, host_link, network, kernels, folder).play(program.entry)


class _Lanes:
    """What has begun beside the cores, on which of `_LANES`, and when it ends."""

    def __init__(self, times: Times):
        self._times = times
        self._free_at = dict.fromkeys(_LANES, 0.0)
        self._begun: dict[str, tuple[str, float]] = {}

    def has(self, name: str) -> bool:
        return name in self._begun

    def begin(self, lane: str, name: str, seconds: float) -> None:
        self._free_at[lane] = max(self._times.total, self._free_at[lane]) + seconds
        self._begun[name] = lane, self._free_at[lane]

    def wait(self, name: str) -> None:
        """Adds to the times what is left of it."""
        lane, end = self._begun[name]
        field = _LANES[lane]
        left = max(0.0, end - self._times.total)
        setattr(self._times, field, getattr(self._times, field) + left)


class _Player:
    def __init__(self, program, chip, host_link, network, kernels, folder):
        self._program, self._network = program, network
        self._chip, self._host_link = chip, host_link
        self._kernels, self._folder = kernels, folder
        self._played: dict[str, Times] = {}

    def play(self, computation: Computation) -> Times:
        if computation.name not in self._played:
            self._played[computation.name] = self._play(computation)
        return self._played[computation.name]

    def _play(self, computation: Computation) -> Times:
        times = Times()
        lanes = _Lanes(times)
        for instruction in computation.instructions.values():
            copy = transfers.transfer(instruction, computation, self._program)
            exchange = self._exchange(instruction, computation)
            if copy is not None:
                lanes.begin(*self._lane(copy, instruction.name))
                if not copy.is_begun:
                    lanes.wait(instruction.name)
            elif exchange is not None:
                self._play_exchange(instruction, computation, *exchange, lanes, times)
            elif instruction.opcode.endswith("-done"):
                start = self._start_of(instruction, computation)
                if lanes.has(start.name):
                    lanes.wait(start.name)
            else:
                self._take(instruction, computation, times)
        return times

    def _play_exchange(self, instruction, computation, name, seconds, lanes, times) -> None:
        """A collective, whole or begun; or a fusion that does a step of one, beside work of its own or without any."""
        begins = not lanes.has(name)
        if begins:
            lanes.begin("links", name, seconds)
        works = estimated_cycles(instruction) is not None
        if works:
            self._take(instruction, computation, times)
        is_whole = name == instruction.name and not instruction.opcode.endswith("-start")
        if is_whole or not (begins or works):
            lanes.wait(name)

    def _exchange(
        self, instruction: Instruction, computation: Computation
    ) -> tuple[str, float] | None:
        """(name, seconds) of the collective that an instruction is or has a step of; None for all others."""
        if instruction.opcode.endswith(("-done", "-update")):
            return None
        one = self._network.collective(Run(instruction, computation, 1, False))
        if one is not None:
            return instruction.name, one.seconds
        inside = self._program.inside(instruction)
        if instruction.opcode not in ("fusion", "async-start") or inside is None:
            return None
        for part in inside.instructions.values():
            one = self._network.collective(Run(part, inside, 1, True))
            if one is not None:
                return collectives.chain_of(part) or instruction.name, one.seconds
        return None

    def _lane(self, copy: transfers.Transfer, name: str) -> tuple[str, str, float]:
        """(lane, name, seconds) of a copy; what is copied within the chip goes once through its memory."""
        if copy.to_host or copy.from_host:
            lane = "to the host" if copy.to_host else "from the host"
            return lane, name, copy.num_bytes / self._host_link
        return "copies", name, copy.num_bytes / self._chip.hbm_bytes_per_second

    def _start_of(self, done: Instruction, computation: Computation) -> Instruction:
        start = computation.operands(done)[0]
        while start.opcode.endswith("-update") or start.opcode in ("get-tuple-element", "bitcast"):
            start = computation.operands(start)[0]
        return start

    def _take(self, instruction: Instruction, computation: Computation, times: Times) -> None:
        """Adds what an instruction takes that occupies the cores."""
        inside = self._program.inside(instruction)
        if instruction.opcode == "while":
            times.add(self.play(inside), self._program.trips(instruction, computation))
        elif instruction.opcode in ("call", "conditional"):
            times.add(self.play(inside))
        elif (kernel := of_instruction(self._kernels, instruction)) is not None:
            times.kernels += max(
                self._kernel_seconds(kernel, instruction),
                self._memory_seconds(instruction, computation),
            )
        else:
            flops, cycles = self._flops(instruction, computation), estimated_cycles(instruction)
            if cycles is not None:
                seconds = cycles / self._chip.clock
                times.estimated += seconds
            else:
                seconds = max(
                    flops / self._chip.peak_flops, self._memory_seconds(instruction, computation)
                )
            if flops:
                times.products += seconds
            else:
                times.between += seconds

    def _kernel_seconds(self, kernel: Kernel, instruction: Instruction) -> float:
        cycles = schedules.cycles(self._folder, instruction.name) if self._folder else None
        if cycles is None:
            return kernel.padded_flops(self._chip.matrix_width) / self._chip.peak_flops
        return cycles / self._chip.clock

    def _flops(self, instruction: Instruction, computation: Computation) -> float:
        inside = self._program.inside(instruction)
        if inside is None:
            return arithmetic.matmul_flops(instruction, computation)
        return sum(self._flops(x, inside) for x in inside.instructions.values())

    def _memory_seconds(self, instruction: Instruction, computation: Computation) -> float:
        moved = arithmetic.memory_bytes(instruction, computation, self._program)
        return moved / self._chip.hbm_bytes_per_second


def estimated_cycles(instruction: Instruction) -> int | None:
    """What the compiler estimates; None where it does not."""
    cycles = instruction.backend_config.get("window_config", {}).get("estimated_cycles")
    return None if cycles is None else int(cycles)
