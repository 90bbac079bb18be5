"""The record of a run's config in its workdir: what it was started with, and what may differ when it goes on.

workdir/config.json            the resolved config, beside the checkpoints (`effjax.checkpoint`)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from effjax.checkpoint import CheckpointError, Checkpoints

CONFIG_FILE = "config.json"

# What may change when a run goes on; everything else makes it another run.
_FREE_FIELDS = (
    "evaluation",
    "mesh",
    "model.num_microbatches",
    "training.checkpoint_every",
    "training.eval_batches",
    "training.eval_every",
    "training.keep",
    "training.keep_best",
    "training.log_every",
    "training.max_skipped",
    "training.nonfinite",
    "training.num_steps",
    "training.offload_optimizer",
    "data.prefetch",
    "data.retries",
    "data.retry_seconds",
)


def save(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Writes the resolved config beside the checkpoints."""
    path = Path(workdir) / CONFIG_FILE
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(_plain(config), indent=2) + "\n")
    unfinished.replace(path)


def load(workdir: str | Path) -> ml_collections.ConfigDict:
    """The config that a run was started with.

    Raises:
      CheckpointError: if the workdir holds no config, or it is not JSON.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; valid: the workdir of a training run")
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def check_same_run(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Checks that a workdir is free, or that its run is the one that `config` describes.

    Model, data, objective, optimizer, seed, accumulation and averaging must be equal; lengths, intervals, mesh and
    evaluation may change from one start to the next. A field that one of them lacks is off in it: None, False or 0.

    Raises:
      CheckpointError: naming every field that differs, with both values.
    """
    workdir = Path(workdir)
    if not (workdir / CONFIG_FILE).exists():
        if Checkpoints(workdir).steps():
            raise CheckpointError(
                f"{workdir} has checkpoints and no {CONFIG_FILE}; valid: another workdir"
            )
        return
    old, new = dict(_flat(_plain(load(workdir)))), dict(_flat(_plain(config)))
    changed = [
        f"{field} (there: {json.dumps(old[field]) if field in old else 'absent'}, "
        f"now: {json.dumps(new[field]) if field in new else 'absent'})"
        for field in sorted(old.keys() | new.keys())
        if (old.get(field) or None) != (new.get(field) or None) and not _is_free(field)
    ]
    if changed:
        raise CheckpointError(
            f"workdir {workdir} belongs to another config: {'; '.join(changed)}; "
            "valid: the same values, or another workdir"
        )


def _plain(config: Any) -> Any:
    """The config as JSON would give it back."""
    return json.loads(json.dumps(_mapping(config), default=_mapping))


def _mapping(value: Any) -> Any:
    """What `json` cannot write by itself; a ConfigDict gives its values with references resolved."""
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise TypeError(
            f"a config holds {value!r}; valid: numbers, strings, None, tuples and dicts"
        )
    return dict(value.items())


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _flat(one, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _is_free(field: str) -> bool:
    return any(field == free or field.startswith(f"{free}.") for free in _FREE_FIELDS)
