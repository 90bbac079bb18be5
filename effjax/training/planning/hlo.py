"""The text of a compiled program: its instructions, and how often each of them runs in one call of the program.

XLA prints a program after all its passes as computations, blocks of instructions in the order in which they run. One of
them is where the program begins; others are what a loop repeats, what a branch takes, or what a fusion computes in one
go:

    %body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
      %p = (s32[], f32[8,8]{1,0}) parameter(0)
      ...
      ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%next, %x)
    }

    ENTRY %main (a: f32[8,8]) -> f32[8,8] {
      ...
      %loop = (s32[], f32[8,8]{1,0}) while(%init), condition=%cond, body=%body, backend_config={...}

XLA's own cost analysis counts the body of such a loop once; `Program.runs` says how often it really runs.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

# Bits of an element, by the name that XLA has for its type.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "s4": 4, "u4": 4, "s2": 2, "u2": 2}

_HEADER = re.compile(r"^(ENTRY )?%([\w.-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = ")
_COMMENT = re.compile(r"/\*index=\d+\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array.

    Attributes:
      dtype: as XLA calls it, "bf16".
      dims: sizes of its dimensions.
      memory_space: where it lives: 0 is the device's main memory, others are what the chip has beside its cores.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes, without padding."""
        width = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(width[0]) if width else 0)
        return math.ceil(self.size * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: of the instruction, and of its result.
      opcode: what it does, "fusion".
      shapes: of its result, the leaves of a tuple in order.
      operands: names of its operands, in the same computation.
      argument: the text between its parentheses, such as the number of a parameter or the value of a constant.
      attributes: the text after its operands.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def backend_config(self) -> dict[str, Any]:
        """What the compiler's backend notes about it; empty if nothing."""
        _, found, text = self.attributes.partition("backend_config=")
        if not found or not text.startswith("{"):
            return {}
        return json.JSONDecoder(strict=False).raw_decode(text)[0]

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that it calls, by the attribute that names them."""
        found = _CALLED.findall(self.attributes.partition("backend_config=")[0])
        return {role: tuple(_OPERAND.findall(names)) for role, names in found}

    def attribute(self, name: str) -> str | None:
        """The text of an attribute that is a word or stands in braces, without these; None if there is no such."""
        found = re.search(
            rf"(?:^|[ ,]){name}=(?:\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|([^,{{]+))", self.attributes
        )
        return None if found is None else (found[1] if found[2] is None else found[2]).strip()

    @property
    def target(self) -> str | None:
        """What a custom call calls."""
        return (self.attribute("custom_call_target") or "").strip('"') or None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A block of instructions, in the order in which they run.

    Attributes:
      name: of the computation.
      instructions: by name.
    """

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The result."""
        return next(x for x in self.instructions.values() if x.is_root)

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions whose results an instruction takes."""
        return tuple(self.instructions[name] for name in instruction.operands)

    @functools.cached_property
    def users(self) -> dict[str, tuple[Instruction, ...]]:
        """The instructions that take the result of each, by its name."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in instruction.operands:
                found[name].append(instruction)
        return {name: tuple(users) for name, users in found.items()}


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that runs.

    Attributes:
      instruction: which one.
      computation: where it stands.
      times: how often it runs in one call of the program.
      is_fused: whether it is a part of a fusion, whose results between stay on the chip.
    """

    instruction: Instruction
    computation: Computation
    times: int
    is_fused: bool


class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: where it begins.
      unknown_loops: loops whose number of trips is known at run time only; they count as one trip.
    """

    def __init__(self, text: str):
        """Reads what `jax.stages.Compiled.as_text()` gives.

        Raises:
          ValueError: for a text that is no such program.
        """
        self.computations, entry = _parse(text)
        if entry is None:
            raise ValueError("the text has no ENTRY computation; valid: that of a compiled program")
        self.entry = self.computations[entry]
        self.unknown_loops = [
            run.instruction.name
            for run in self.runs()
            if run.instruction.opcode == "while" and self._known_trips(run) is None
        ]

    def runs(self) -> Iterator[Run]:
        """Every instruction that runs, with how often it does, in the order in which they first begin.

        Of the branches of a conditional the longest counts, as if it were always taken.
        """
        yield from self._runs_in(self.entry, 1, False)

    def trips(self, loop: Instruction, computation: Computation) -> int:
        """How often a loop runs its body; 1 if only its run time knows."""
        known = self._known_trips(Run(loop, computation, 1, False))
        return 1 if known is None else known

    def inside(self, instruction: Instruction) -> Computation | None:
        """The computation that an instruction runs: a body, the longest of some branches, what a fusion fuses."""
        called = instruction.called
        if instruction.opcode == "while":
            return self.computations[called["body"][0]]
        if instruction.opcode == "conditional":
            branches = called.get("branch_computations") or (
                called["true_computation"] + called["false_computation"]
            )
            return max((self.computations[name] for name in branches), key=self._length)
        # What all others apply are operations on scalars, such as the addition of a sum.
        names = called.get("to_apply" if instruction.opcode == "call" else "calls")
        return self.computations[names[0]] if names else None

    def _runs_in(self, computation: Computation, times: int, is_fused: bool) -> Iterator[Run]:
        for instruction in computation.instructions.values():
            yield Run(instruction, computation, times, is_fused)
            inside = self.inside(instruction)
            if inside is not None:
                trips = self.trips(instruction, computation) if instruction.opcode == "while" else 1
                fused = is_fused or instruction.opcode in ("fusion", "fusion-start")
                yield from self._runs_in(inside, times * trips, fused)

    def _length(self, computation: Computation) -> int:
        return sum(run.times for run in self._runs_in(computation, 1, False))

    def _known_trips(self, run: Run) -> int | None:
        """From what the compiler notes, or from the loop itself: a counter that goes up from and to a constant."""
        loop = run.instruction
        noted = loop.backend_config.get("known_trip_count")
        if noted is not None:
            return int(noted["n"])
        condition = self.computations[loop.called["condition"][0]]
        body = self.computations[loop.called["body"][0]]
        test = self._comparison(condition)
        if test is None:
            return None
        index, bound = test
        start = self._element(
            run.computation, run.computation.instructions[loop.operands[0]], index
        )
        step = self._step(body, index)
        if start is None or step is None or step < 1:
            return None
        return max(0, math.ceil((bound - start) / step))

    def _comparison(self, condition: Computation) -> tuple[int, int] | None:
        """(index, bound) of a condition `state[index] < bound`."""
        root = condition.root
        constants = [x for x in condition.instructions.values() if x.opcode == "constant"]
        indices = [x for x in condition.instructions.values() if x.opcode == "get-tuple-element"]
        inner = self.inside(root)
        compare = (inner or condition).root
        if compare.opcode != "compare" or compare.attribute("direction") != "LT":
            return None
        if len(constants) != 1 or len(indices) != 1:
            return None
        return int(indices[0].attribute("index")), int(constants[0].argument)

    def _element(self, computation: Computation, state: Instruction, index: int) -> int | None:
        """The constant at an index of a tuple."""
        while state.opcode in ("copy", "bitcast"):
            state = computation.instructions[state.operands[0]]
        if state.opcode != "tuple":
            return None
        return _constant(computation, computation.instructions[state.operands[index]])

    def _step(self, body: Computation, index: int) -> int | None:
        """What a body adds to the counter at an index of its state."""
        if body.root.opcode != "tuple":
            return None
        counter = body.instructions[body.root.operands[index]]
        inner = self.inside(counter)
        add = (inner or body).root if inner is not None else counter
        if add.opcode != "add":
            return None
        terms = [_constant(inner or body, x) for x in (inner or body).operands(add)]
        if inner is not None:
            terms += [_constant(body, x) for x in body.operands(counter)]
        constants = [x for x in terms if x is not None]
        return constants[0] if len(constants) == 1 else None


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation.instructions[instruction.operands[0]]
    is_number = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument)
    return int(instruction.argument) if is_number else None


def _parse(text: str) -> tuple[dict[str, Computation], str | None]:
    """All computations, and the name of the one where the program begins."""
    computations: dict[str, Computation] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}") and name is not None:
            found = (_instruction(one) for one in lines)
            computations[name] = Computation(name, {x.name: x for x in found})
            name = None
        elif name is not None and _INSTRUCTION.match(line):
            lines.append(line)
        elif name is not None and lines:
            lines[-1] += "\n" + line  # the metadata of a kernel is as its author wrote it
    return computations, entry


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    argument = _COMMENT.sub("", rest[len(opcode) + 1 : close])
    return Instruction(
        name=start[2],
        opcode=opcode,
        shapes=tuple(_shape(*found) for found in _ARRAY.findall(_COMMENT.sub("", shapes))),
        operands=() if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(argument)),
        argument=argument,
        attributes=rest[close + 1 :].lstrip(", "),
        is_root=bool(start[1]),
    )


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = _MEMORY_SPACE.search(layout)
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, int(space[1]) if space else 0)


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`; those within strings do not count."""
    depth, is_quoted = 0, False
    for match in re.finditer(r'[()"]|\\.', text[opening:]):
        if match[0] == '"':
            is_quoted = not is_quoted
        elif not is_quoted and match[0] in "()":
            depth += 1 if match[0] == "(" else -1
            if depth == 0:
                return opening + match.start()
    raise ValueError(f"no closing parenthesis in {text[:200]!r}")
