"""Which mesh, how many micro-batches and what to recompute: every candidate is planned, and they are ranked."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from effjax.depth.stack import REMAT_POLICIES
from effjax.evaluation.report import plain
from effjax.training import config as configs
from effjax.training.planning import report, topologies
from effjax.training.planning.training_step import plan

# Chips that share the heads and hidden units of a layer are neighbours; more than these are none of each other.
_TENSOR = (1, 2, 4, 8)
_ACCUMULATION = (1, 2, 4)


def candidates(config: Mapping[str, Any], topology: str) -> Iterator[dict[str, Any]]:
    """Overrides of a config that are worth a plan: `mesh`, `accumulation_steps` and `remat`.

    Parameters are split over all chips that do not share a layer or hold experts, or the batch alone is, or a copy of
    the parameters is split over 8 or 64 of them.
    """
    num_chips = topologies.mesh(topology, {"data": -1}).size
    experts = configs.resolve(config)["model"].get("ffn", {}).get("num_experts", 1)
    for tensor, expert in itertools.product(_TENSOR, _divisors(experts)):
        rest, left = divmod(num_chips, tensor * expert)
        if left or not rest:
            continue
        for fsdp in sorted({rest, 1, *(x for x in (8, 64) if rest % x == 0 and x < rest)}):
            mesh = {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "expert": expert}
            for accumulation, remat in itertools.product(_ACCUMULATION, REMAT_POLICIES):
                if config["data"]["batch_size"] % (rest * expert * accumulation) == 0:
                    yield {"mesh": mesh, "accumulation_steps": accumulation, "remat": remat}


def search(
    config: Mapping[str, Any],
    topology: str,
    path: str | Path,
    among: Sequence[Mapping[str, Any]] | None = None,
    schedules: Path | None = None,
) -> list[dict[str, Any]]:
    """Plans every candidate and ranks them: those that fit by tokens a second, then those that do not.

    Each plan is written to a JSON file when it is done, and a search that was interrupted goes on from there.

    Args:
      config: as for `plan`; what it says of mesh, micro-batches and remat is not looked at.
      topology: as for `plan`.
      path: the JSON file.
      among: overrides to try, as `candidates` gives them, which are tried by default.
      schedules: as for `plan`.

    Returns:
      Plans as `Plan.to_json` gives them, all that the file has.

    Raises:
      ValueError: for an unknown topology; or if the file is of a search for another config or topology.
    """
    path = Path(path)
    config = configs.resolve(config)
    asked = {"topology": topology, "config": plain(_fixed(config))}
    done = _read(path, asked)
    among = list(candidates(config, topology)) if among is None else among
    todo = [x for x in among if _key(x) not in done]
    columns = (TextColumn("planning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[now]}")) as bar:
        task = bar.add_task("", total=len(done) + len(todo), completed=len(done), now="")
        for candidate in todo:
            bar.update(task, now=_key(candidate))
            done[_key(candidate)] = _planned(config, topology, candidate, schedules)
            report.write_json(path, asked | {"plans": done})
            bar.advance(task)
    return sorted(done.values(), key=_rank)


def _planned(config, topology: str, candidate: Mapping[str, Any], schedules: Path | None) -> Any:
    changed = config | {
        "mesh": candidate["mesh"],
        "training": config["training"] | {"accumulation_steps": candidate["accumulation_steps"]},
        "model": config["model"] | {"remat": candidate["remat"]},
    }
    return plain(plan(changed, topology, schedules).to_json())


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config is the same for all candidates."""
    fixed = {key: value for key, value in config.items() if key != "mesh"}
    fixed["training"] = {k: v for k, v in config["training"].items() if k != "accumulation_steps"}
    fixed["model"] = {k: v for k, v in config["model"].items() if k != "remat"}
    return fixed


def _read(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The plans that are done."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    for name, value in asked.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} is of a search for another {name}; valid: another workdir, or none of that file"
            )
    return found["plans"]


def _key(candidate: Mapping[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in candidate["mesh"].items() if size > 1)
    return f"{mesh or 'one chip'}, accumulation {candidate['accumulation_steps']}, remat {candidate['remat']}"


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    fits = row["fits"] and row["pace"] is not None
    return not fits, (-row["pace"]["tokens_per_second"] if fits else row["memory"]["total"])


def _divisors(number: int) -> list[int]:
    return [x for x in range(1, number + 1) if number % x == 0]
