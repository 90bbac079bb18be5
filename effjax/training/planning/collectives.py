"""Communication between chips: what of it a compiled program does, along which mesh axes, and how long it takes."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from effjax.training.planning.hlo import Instruction, Program, Run
from pallas_kernels.chips import Chip

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# Bytes that a chip receives for each byte that it gives in, from n chips, by algorithms that no other beats: Thakur,
# Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005, section 4.
_RECEIVED = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes along which the chips of a group lie; all groups do the same at once.
      group_size: chips of a group.
      num_bytes: bytes that a chip receives.
      seconds: the least that this takes on the links of the chip; 0 where these are not known.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    num_bytes: float
    seconds: float


class Network:
    """The chips of a mesh and what lies between them."""

    def __init__(self, mesh: Mesh, chip: Chip | None):
        """Takes a mesh, whose devices may be absent, and their chip; None is one of which nothing is known."""
        self._mesh, self._chip = mesh, chip
        self._devices = list(mesh.devices.flat)
        self._extent = _extent(self._devices)
        self._links = functools.cache(self._links_of)

    def collective(self, run: Run) -> Collective | None:
        """What an instruction exchanges; None if it does not, or only ends what another began."""
        kind = kind_of(run.instruction)
        if kind is None:
            return None
        if kind == "all-reduce" and run.is_fused and _is_sliced(run):
            kind = "reduce-scatter"  # so a TPU's compiler writes one
        groups = _groups(run.instruction, dict(self._mesh.shape), len(self._devices))
        group = tuple(max(groups, key=len))
        operands = run.computation.operands(run.instruction)
        given = sum(shape.num_bytes for x in operands for shape in x.shapes)
        num_bytes = given * _RECEIVED[kind](len(group)) if len(group) > 1 else 0.0
        seconds = num_bytes / self._links(group) if self._chip and num_bytes else 0.0
        return Collective(kind, self._axes(group), len(group), num_bytes, seconds)

    def _axes(self, group: tuple[int, ...]) -> tuple[str, ...]:
        """The axes along which the coordinates of a group's members differ."""
        places = np.array(np.unravel_index(group, tuple(self._mesh.shape.values())))
        differs = (places != places[:, :1]).any(axis=1)
        return tuple(axis for axis, d in zip(self._mesh.shape, differs, strict=True) if d)

    def _links_of(self, group: tuple[int, ...]) -> float:
        """Bytes a second that a chip can receive from the others of a group.

        In a torus a group has the links along each dimension that it extends in: two where its row is a ring, one where
        it is not, for then the chips at the ends have no more.
        """
        devices = [self._devices[i] for i in group]
        if self._chip.wraps_at is None:
            hosts = {device.process_index for device in devices}
            return (
                self._chip.link_bytes_per_second
                if len(hosts) == 1
                else self._chip.host_bytes_per_second
            )
        links = 0
        for dimension, whole in zip(
            np.array([d.coords for d in devices]).T, self._extent, strict=True
        ):
            size = np.unique(dimension).size
            if size > 1:
                is_ring = size == whole and whole % self._chip.wraps_at == 0
                links += 2 if is_ring else 1
        return max(1, links) * self._chip.link_bytes_per_second


def chain_of(instruction: Instruction) -> str | None:
    """What the parts of one collective have in common that several fusions do a step of each; None for a whole one."""
    if "chain_id=" not in (instruction.attribute("frontend_attributes") or ""):
        return None
    return instruction.attribute("channel_id")


def kind_of(instruction: Instruction) -> str | None:
    """The kind of collective that an instruction does, or begins."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def total(program: Program, network: Network) -> list[dict[str, Any]]:
    """Kind, axes, times, bytes that a chip receives, and seconds of the collectives of a program; most bytes first."""
    found: Mapping[Any, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    chains = set()
    for run in program.runs():
        one, chain = network.collective(run), chain_of(run.instruction)
        if one is not None and one.num_bytes and chain not in chains:
            chains |= {chain} - {None}
            sums = found[one.kind, one.axes]
            sums[0] += run.times
            sums[1] += one.num_bytes * run.times
            sums[2] += one.seconds * run.times
    rows = [
        {"kind": kind, "axes": list(axes), "times": times, "bytes": num_bytes, "seconds": seconds}
        for (kind, axes), (times, num_bytes, seconds) in found.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def _is_sliced(run: Run) -> bool:
    """Whether of a result only a slice is used."""
    users = run.computation.users[run.instruction.name]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _extent(devices: Sequence[Any]) -> tuple[int, ...]:
    """Chips along each dimension of the torus; () where devices have no coordinates."""
    if not all(hasattr(device, "coords") for device in devices):
        return ()
    return tuple(int(x) + 1 for x in np.max([device.coords for device in devices], axis=0))


def _groups(
    instruction: Instruction, mesh: Mapping[str, int], num_devices: int
) -> Iterable[Sequence[int]]:
    """Groups of partitions that exchange among themselves, in whichever way the program writes them."""
    pairs = instruction.attribute("source_target_pairs")
    if pairs is not None:
        # A shift: who meets whom through any number of steps lies along the same axes.
        return [max(_braces(pairs), key=lambda pair: abs(pair[0] - pair[1]))]
    text = instruction.attributes.partition("replica_groups=")[2]
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is not None:
        shape, dims, order = (_ints(part) for part in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
        return ids.reshape(shape).tolist()
    named = re.match(r"(?:@\w+\s*|mesh)\[([^\]]*)\](?:,? device_ids=\([^)]*\))? ?\{([^}]*)\}", text)
    if named is not None:
        return _named_groups(named[1], named[2])
    listed = instruction.attribute("replica_groups")
    return _braces(listed) if listed else [range(num_devices)]


def _named_groups(axes: str, along: str) -> list[list[int]]:
    """Groups along some axes of a mesh that the program itself describes: 'a'=2,'b'=4 and 'b', or 'b':(1)2 of it."""
    dims: list[int] = []
    is_along: list[bool] = []
    wanted = {
        name: (part, size) for name, part, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
    }
    for name, size in re.findall(r"'(\w+)'=(\d+)", axes):
        part, sub = wanted.get(name, ("", ""))
        if name in wanted and part:
            before, of = int(part), int(sub)
            dims += [before, of, int(size) // before // of]
            is_along += [False, True, False]
        else:
            dims.append(int(size))
            is_along.append(name in wanted)
    order = [i for i, x in enumerate(is_along) if not x] + [i for i, x in enumerate(is_along) if x]
    size = math.prod(d for d, x in zip(dims, is_along, strict=True) if x)
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, size).tolist()


def _braces(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,\s]+)\}", text)] or [_ints(text)]


def _ints(text: str | None) -> list[int]:
    return [int(x) for x in text.split(",")] if text else []
