"""What `train.py --plan.topology=...` does: plans, prints, and leaves the plan in the workdir."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from effjax.training.planning import report
from effjax.training.planning.decoding_step import plan_decoding
from effjax.training.planning.ranking import search
from effjax.training.planning.schedules import leave
from effjax.training.planning.training_step import plan


def run(
    config: Mapping[str, Any],
    topology: str,
    workdir: str | Path,
    searching: bool = False,
    decode_batch: int | None = None,
    decode_context: int | None = None,
) -> None:
    """Plans for a topology and leaves `plan-<topology>.json` and `.png` in the workdir.

    Args:
      config: as for `plan`.
      topology: as for `plan`.
      workdir: where the files go.
      searching: search instead (`search`), and leave `search-<topology>.json`.
      decode_batch: plan a decoding step of so many texts instead, and leave `decode-<topology>` files.
      decode_context: tokens of each; None: the model's `max_seq_len`.

    Raises:
      ValueError: as `plan` does; or for decoding and searching at once.
    """
    if searching and decode_batch is not None:
        raise ValueError("--plan.search with --plan.decode_batch; valid: one of them")
    if decode_batch is None and decode_context is not None:
        raise ValueError(
            "--plan.decode_context without --plan.decode_batch; valid: both, or neither"
        )
    jax.config.update("jax_platforms", "cpu")  # the machine planned for need not be here
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program leaves no schedules
    console, suffix = Console(highlight=False, soft_wrap=True), topology.replace(":", "-")
    with tempfile.TemporaryDirectory() as folder:
        leave(folder)
        schedules = Path(folder)
        if searching:
            path = Path(workdir) / f"search-{suffix}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            plans = search(config, topology, path, schedules=schedules)
            console.print(report.ranking(plans))
            console.print(f"wrote {path}", markup=False)
            return
        if decode_batch is None:
            found = plan(config, topology, schedules)
        else:
            found = plan_decoding(
                config,
                topology,
                batch_size=decode_batch,
                context=decode_context or config["model"]["max_seq_len"],
                schedules=schedules,
            )
    console.print(report.tables(found))
    name = f"{'plan' if decode_batch is None else 'decode'}-{suffix}"
    written = report.write(found, workdir, name)
    console.print(f"wrote {', '.join(map(str, written))}", markup=False)
