"""What a run leaves in its workdir to be picked up again: its config, and checkpoints of its state.

    workdir/config.json            the resolved config
    workdir/checkpoints/<step>/    one checkpoint, complete or absent
        params/  ema/              parameters, and their average if there is one
        rest/                      step, optimizer state, random key
        data/                      state of the data iterator, a file a process
        progress/                  anything else that the loop carries, and the digests of the arrays

A step directory is written under another name and renamed when everything is in it, so a kill at any moment leaves
the checkpoints before it. What a disk may do to a directory afterwards (truncate, lose or flip) is found on reading, by
the formats themselves and by a digest of each item's arrays; reading then goes on with the checkpoint before.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged_checkpoints"

# What may change when a run goes on; everything else makes it another run.
_FREE_FIELDS = (
    "evaluation",
    "mesh",
    "training.checkpoint_every",
    "training.eval_batches",
    "training.eval_every",
    "training.keep",
    "training.keep_best",
    "training.log_every",
    "training.num_steps",
    "data.prefetch",
)


class CheckpointError(ValueError):
    """There is no checkpoint that can be used, or it is not of this run; the message names the path."""


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest `keep` and the best one kept.

    A context manager; leaving it waits for the save in flight.

    Attributes:
      directory: where the step directories lie.
      keep: how many of the newest checkpoints are kept.
      keep_best: whether the one of lowest held-out loss is kept as well.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 2, keep_best: bool = False):
        self.directory = Path(workdir).absolute() / FOLDER
        self.keep = keep
        self.keep_best = keep_best

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, in increasing order."""
        return _steps(self.directory)

    def save(
        self,
        state: Any,
        iterator: Any,
        progress: Mapping[str, Any],
        heldout_loss: float | None = None,
    ) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        Args:
          state: a dataclass with the fields `step`, `params`, `ema` (or None) and any others.
          iterator: a grain iterator; its next batch is what a restored run sees first.
          progress: JSON-able values to get back on restoring.
          heldout_loss: of this state, if it was measured; ranks the checkpoint for `keep_best`.

        Raises:
          FloatingPointError: if an array of the state is not finite; nothing is written.
        """
        import grain  # its handler writes the iterator's state, one file a process

        step = int(state.step)
        items = _items(state)
        digests = {name: digest(tree) for name, tree in items.items()}
        record = {"digests": digests, "heldout_loss": heldout_loss, "progress": dict(progress)}
        if heldout_loss is not None:
            self._policy.losses[step] = heldout_loss
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        data = grain.checkpoint.CheckpointSave(iterator)
        args = ocp.args.Composite(**arrays, data=data, progress=ocp.args.JsonSave(record))
        self._manager.save(step, args=args, force=True)

    def restore[State](
        self, abstract_state: State, iterator: Any
    ) -> tuple[State, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        Damaged ones that are newer are named in a warning and moved to `damaged_checkpoints`.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct`s with the shardings to restore onto, which need not be
            those that were saved.
          iterator: a grain iterator; its state is set in place.

        Returns:
          The state and the progress that was saved with it; None if nothing was saved yet.

        Raises:
          CheckpointError: if there are checkpoints and all of them are damaged.
        """
        read = functools.partial(_read_state, abstract_state=abstract_state, iterator=iterator)
        found = _newest_readable(self.directory, read)
        if found is None:
            return None
        restored, damaged = found
        for path in damaged:
            _set_aside(path)
        return restored

    def wait(self) -> None:
        """Returns when the save in flight is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads."""
        if "_manager" in self.__dict__:
            self._manager.close()

    @functools.cached_property
    def _policy(self) -> "_KeepBest":
        losses = {step: _heldout_loss(self.directory / str(step)) for step in self.steps()}
        return _KeepBest({step: loss for step, loss in losses.items() if loss is not None})

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        policies = [checkpoint_managers.LatestN(self.keep)] + [self._policy] * self.keep_best
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)


def restore_variables(workdir: str | Path, step: int | None = None) -> tuple[dict[str, Any], int]:
    """The variables that a run would be evaluated with: averaged parameters where it keeps an average.

    Args:
      workdir: of the run.
      step: which checkpoint; None takes the newest that is whole.

    Returns:
      `{"params": ...}` on the first device, and the step.

    Raises:
      CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    directory = Path(workdir).absolute() / FOLDER
    steps = _steps(directory)
    if not steps or step not in (None, *steps):
        has = f"has the steps {', '.join(map(str, steps))}" if steps else "has none"
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"{wanted} was asked for, and {directory} {has}")
    found = _newest_readable(directory, _read_variables, None if step is None else [step])
    assert found is not None  # steps is not empty
    return found[0]


def save_config(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Writes the resolved config beside the checkpoints."""
    path = Path(workdir) / CONFIG_FILE
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(_plain(config), indent=2) + "\n")
    unfinished.replace(path)


def load_config(workdir: str | Path) -> ml_collections.ConfigDict:
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
    evaluation may change from one start to the next.

    Raises:
      CheckpointError: naming every field that differs, with both values.
    """
    workdir = Path(workdir)
    if not (workdir / CONFIG_FILE).exists():
        if _steps(workdir / FOLDER):
            raise CheckpointError(
                f"{workdir} has checkpoints and no {CONFIG_FILE}; valid: another workdir"
            )
        return
    old, new = dict(_flat(_plain(load_config(workdir)))), dict(_flat(_plain(config)))
    absent = object()
    changed = [
        f"{field} (there: {json.dumps(old[field]) if field in old else 'absent'}, "
        f"now: {json.dumps(new[field]) if field in new else 'absent'})"
        for field in sorted(old.keys() | new.keys())
        if old.get(field, absent) != new.get(field, absent) and not _is_free(field)
    ]
    if changed:
        raise CheckpointError(
            f"workdir {workdir} belongs to another config: {'; '.join(changed)}; "
            "valid: the same values, or another workdir"
        )


def digest(tree: Any) -> int:
    """A number that any flipped bit of any array changes, whatever the shardings: sums of their bits modulo 2^32.

    Raises:
      FloatingPointError: if an array has an element that is not finite, naming the arrays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    checked = jax.device_get(_sums_of_bits([leaf for _, leaf in leaves]))
    poisoned = [
        jax.tree_util.keystr(path)
        for (path, _), (_, is_finite) in zip(leaves, checked, strict=True)
        if not is_finite
    ]
    if poisoned:
        raise FloatingPointError(f"not finite: {', '.join(poisoned)}")
    # Arrays are not interchangeable, so their sums are not simply added.
    return functools.reduce(lambda total, one: (31 * total + int(one[0])) % 2**32, checked, 0)


@jax.jit
def _sums_of_bits(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return [_sum_of_bits(x) for x in arrays]


def _sum_of_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = x.astype(unsigned) if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    return jnp.sum(bits, dtype=jnp.uint32), finite


@dataclasses.dataclass
class _KeepBest(checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoint of lowest held-out loss; `losses` is by step."""

    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        measured = [c.step for c in checkpoints if c.step in self.losses]
        best = min(measured, key=self.losses.__getitem__, default=None)
        return [c.step == best for c in checkpoints]


def _items(state: Any) -> dict[str, Any]:
    """The arrays of a state by item: parameters as they are, the rest flat, by path, whatever classes hold it."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    items = {"params": fields.pop("params")}
    ema = fields.pop("ema")
    if ema is not None:
        items["ema"] = ema
    leaves = jax.tree_util.tree_leaves_with_path(fields)
    return items | {"rest": {jax.tree_util.keystr(path): leaf for path, leaf in leaves}}


def _from_items[State](like: State, items: Mapping[str, Any]) -> State:
    """The inverse of `_items`, in the structure of `like`."""
    fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    rest = {name: value for name, value in fields.items() if name not in ("params", "ema")}
    rest = jax.tree_util.tree_map_with_path(
        lambda path, _: items["rest"][jax.tree_util.keystr(path)], rest
    )
    return type(like)(params=items["params"], ema=items.get("ema"), **rest)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _newest_readable(directory: Path, read: Any, steps: Sequence[int] | None = None) -> Any:
    """(What `read(step directory)` returns for the newest it can read, the directories it failed on); None if empty."""
    damaged: dict[Path, Exception] = {}
    for step in reversed(_steps(directory) if steps is None else steps):
        path = directory / str(step)
        try:
            found = read(path)
        except Exception as error:  # the readers raise whatever their formats trip over
            damaged[path] = error
            logger.warning("checkpoint %s cannot be read: %s", path, _short(error))
            continue
        if damaged:
            logger.warning("going on with the checkpoint before, %s", path)
        return found, list(damaged)
    if damaged:
        reasons = "; ".join(f"{path}: {_short(error)}" for path, error in damaged.items())
        raise CheckpointError(f"no checkpoint can be read ({reasons})")
    return None


def _read_state[State](
    path: Path, abstract_state: State, iterator: Any
) -> tuple[State, dict[str, Any]]:
    import grain

    record = _record(path)
    items = {
        name: _read_arrays(path / name, tree, record["digests"][name])
        for name, tree in _items(abstract_state).items()
    }
    grain.checkpoint.CheckpointHandler().restore(path / "data", item=iterator)
    return _from_items(abstract_state, items), record["progress"]


def _read_variables(path: Path) -> tuple[dict[str, Any], int]:
    digests = _record(path)["digests"]
    name = "ema" if "ema" in digests else "params"
    metadata = ocp.StandardCheckpointHandler().metadata(path / name).tree
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), metadata
    )
    return {"params": _read_arrays(path / name, abstract, digests[name])}, int(path.name)


def _read_arrays(path: Path, abstract: Any, expected_digest: int) -> Any:
    with ocp.StandardCheckpointer() as reader:
        arrays = reader.restore(path, abstract)
    if digest(arrays) != expected_digest:
        raise CheckpointError("its arrays are not those that were saved (digests differ)")
    return arrays


def _record(path: Path) -> dict[str, Any]:
    return json.loads((path / "progress" / "metadata").read_text())


def _heldout_loss(path: Path) -> float | None:
    try:
        return _record(path)["heldout_loss"]
    except (OSError, ValueError, KeyError):
        return None  # a damaged checkpoint is nobody's best


def _set_aside(path: Path) -> None:
    """Moves a damaged checkpoint out of the way of the one that the run will write at that step."""
    folder = path.parent.with_name(DAMAGED_FOLDER)
    folder.mkdir(exist_ok=True)
    number = sum(1 for _ in folder.glob(f"{path.name}.*"))
    path.rename(folder / f"{path.name}.{number}")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


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
