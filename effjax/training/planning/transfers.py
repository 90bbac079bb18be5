"""Copies that a compiled program makes beside its computing: within the memory of a chip, and to and from its host's.

What a config keeps in the memory of the hosts, the optimizer's state (`training.offload_optimizer`) or what the
backward pass needs (`model.remat=offload`), passes the link between a chip and its host, both ways at once if need be.
"""

import dataclasses

from effjax.training.planning.collectives import kind_of
from effjax.training.planning.hlo import Computation, Instruction, Program, Shape

# The memory of the host, as XLA numbers memories (`Layout::kHostMemorySpace`).
HOST = 5

_MOVES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A copy.

    Attributes:
      num_bytes: what is copied.
      source: number of the memory where it was.
      target: number of the memory where it is then.
      is_begun: whether it ends at another instruction, and runs beside those between.
    """

    num_bytes: int
    source: int
    target: int
    is_begun: bool

    @property
    def to_host(self) -> bool:
        """Whether it goes to the host's memory."""
        return self.target == HOST != self.source

    @property
    def from_host(self) -> bool:
        """Whether it comes from the host's memory."""
        return self.source == HOST != self.target


def transfer(
    instruction: Instruction, computation: Computation, program: Program
) -> Transfer | None:
    """The copy that an instruction begins, or does to or from the host; None for all else.

    A whole copy within a chip occupies its cores as other operations do.
    """
    begun = instruction.opcode.endswith("-start") and kind_of(instruction) is None
    if not begun and instruction.opcode not in _MOVES:
        return None
    if begun:
        move, shapes = _begun(instruction, program)
    else:
        operands = [x.shapes[0] for x in computation.operands(instruction)]
        move, shapes = instruction.opcode, (*operands, *instruction.shapes)
    if move is None:
        return None
    source, target = shapes[0], shapes[-1]
    moved = target
    if move == "dynamic-update-slice":  # what is not updated stays where it is
        moved = source = shapes[1]
    found = Transfer(moved.num_bytes, source.memory_space, target.memory_space, begun)
    return found if begun or found.to_host or found.from_host else None


def _begun(instruction: Instruction, program: Program) -> tuple[str | None, tuple[Shape, ...]]:
    """(What is begun, the shapes of its operands and its result); None where it is no copy."""
    move, shapes = instruction.opcode.removesuffix("-start"), instruction.shapes
    if move == "copy":
        target, source, _ = shapes
        return move, (source, target)
    inside = program.inside(instruction)
    if inside is not None:
        parts = inside.instructions.values()
        moves = [x for x in parts if x.opcode in _MOVES]
        if not moves or any(map(kind_of, parts)):
            return None, ()
        operands = (x.shapes[0] for x in inside.operands(moves[-1]))
        return moves[-1].opcode, (*operands, *shapes[-2:-1])
    return (move if move in _MOVES else None), shapes[:-1]
