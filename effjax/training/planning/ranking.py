"""Which mesh, how many micro-batches and what to recompute: every candidate is planned, and they are ranked.

A batch is cut into micro-batches either to accumulate their gradients or to follow each other through the stages of a
pipeline. That stages have no work in S - 1 of M + S - 1 steps needs no term here: the compiled loop has all the steps,
and its trips are what time and operations are multiplied by.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from effjax import models
from effjax.depth.stack import REMAT_POLICIES
from effjax.evaluation.report import plain
from effjax.training import config as configs
from effjax.training.planning import report, topologies
from effjax.training.planning.training_step import plan

# Chips that share the heads and hidden units of a layer are neighbours; more than these are none of each other.
_TENSOR = (1, 2, 4, 8)
_ACCUMULATION = (1, 2, 4)
_STAGES = (2, 4, 8)
_MICROBATCHES_A_STAGE = (2, 4, 8)
_OF_MODEL = ("num_microbatches", "remat")


def candidates(config: Mapping[str, Any], topology: str) -> Iterator[dict[str, Any]]:
    """Overrides of a config that are worth a plan: `mesh`, `accumulation_steps`, `num_microbatches` and `remat`.

    Parameters are split over all chips that do not share a layer or hold experts, or the batch alone is, or a copy of
    the parameters is split over 8 or 64 of them. Where the layers divide into stages there are pipelines too, each
    stage split over all of its chips.
    """
    config = configs.resolve(config)
    num_chips = topologies.mesh(topology, {"data": -1}).size
    experts = config["model"].get("ffn", {}).get("num_experts", 1)
    for stages, tensor, expert in itertools.product(
        (1, *_stages(config)), _TENSOR, _divisors(experts)
    ):
        rest, left = divmod(num_chips, stages * tensor * expert)
        if left or not rest:
            continue
        for fsdp in _splits(rest) if stages == 1 else (rest,):
            sizes = (stages, rest // fsdp, fsdp, tensor, expert)
            mesh = dict(zip(("pipeline", "data", "fsdp", "tensor", "expert"), sizes, strict=True))
            for (accumulation, micro), remat in itertools.product(_cuts(stages), REMAT_POLICIES):
                parts = rest * expert * accumulation * (micro or 1)
                if config["data"]["batch_size"] % parts == 0:
                    yield {
                        "mesh": mesh,
                        "accumulation_steps": accumulation,
                        "num_microbatches": micro,
                        "remat": remat,
                    }


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
        "model": config["model"] | {name: candidate[name] for name in _OF_MODEL},
    }
    return plain(plan(changed, topology, schedules).to_json())


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config is the same for all candidates."""
    fixed = {key: value for key, value in config.items() if key != "mesh"}
    fixed["training"] = {k: v for k, v in config["training"].items() if k != "accumulation_steps"}
    fixed["model"] = {k: v for k, v in config["model"].items() if k not in _OF_MODEL}
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
    micro = candidate["num_microbatches"]
    cut = f"micro-batches {micro}" if micro else f"accumulation {candidate['accumulation_steps']}"
    return f"{mesh or 'one chip'}, {cut}, remat {candidate['remat']}"


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    fits = row["fits"] and row["pace"] is not None
    return not fits, (-row["pace"]["tokens_per_second"] if fits else row["memory"]["total"])


def _stages(config: Mapping[str, Any]) -> list[int]:
    """Stages that the layers of a resolved config divide into."""
    model = models.create(**config["model"])
    if not model.scan_layers:
        return []
    try:
        stacks = model.depth.repeated(model.stack())
    except ValueError:  # recursions that share what a pipeline does not keep
        return []
    return [size for size in _STAGES if all(x.num_repeats % size == 0 for x in stacks)]


def _cuts(stages: int) -> list[tuple[int, int | None]]:
    """(Accumulation steps, micro-batches of a pipeline) that batches are cut into."""
    if stages == 1:
        return [(count, None) for count in _ACCUMULATION]
    return [(1, stages * count) for count in _MICROBATCHES_A_STAGE]


def _splits(chips: int) -> list[int]:
    """Chips that a copy of the parameters is split over, of so many that share no layer."""
    return sorted({chips, 1, *(x for x in (8, 64) if chips % x == 0 and x < chips)})


def _divisors(number: int) -> list[int]:
    return [x for x in range(1, number + 1) if number % x == 0]
