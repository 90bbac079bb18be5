"""What a run leaves in its workdir to be picked up again: checkpoints of its state.

    workdir/checkpoints/<step>/    one checkpoint, complete or absent
        params/  ema/              parameters, and their average if there is one
        rest/                      step, optimizer state, random key
        data/                      state of the data, a file a process with that of the rows that it made
        progress/                  anything else that the loop carries, and the digests of the arrays

A step directory is written under another name and renamed when everything is in it, so a kill at any moment leaves
the checkpoints before it. What a disk may do to a directory afterwards (truncate, lose or flip) is found on reading, by
the formats themselves and by a digest of each item's arrays; reading then goes on with the checkpoint before.

Several processes save and restore together, each the parts of the arrays that its devices hold, in one folder that all
can reach. They agree on what can be read: a checkpoint that one of them cannot read is damaged for all. A run may go on
with another number of processes than it was saved by.
"""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from effjax import data, processes
from effjax.digest import digest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged_checkpoints"

_ARRAY_ITEMS = ("params", "ema", "rest")
_MIN_SLICE_BYTES = 2**22
# In the message of the ValueError that the format of the arrays makes of an error of the disk.
_DISK_ERROR = "os_error_code"


class CheckpointError(ValueError):
    """There is no checkpoint that can be used, or it is not of this run; the message names the path."""


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest `keep` and the best one kept.

    A context manager; leaving it waits for the save in flight. When one of several processes leaves it by an exception
    it does not wait: the others, whose part of the save would have to come, may be gone.

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

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or not processes.several():
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
          CheckpointError: if this checkpoint or the one before it cannot be written. `wait` and `close` raise it too.
        """
        import grain  # its handler writes the iterator's state, one file a process

        step = int(state.step)
        items = _items(state)
        digests = {name: digest(tree) for name, tree in items.items()}
        record = {"digests": digests, "heldout_loss": heldout_loss, "progress": dict(progress)}
        if heldout_loss is not None:
            self._policy.losses[step] = heldout_loss
        arrays = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(
            **arrays,
            data=grain.checkpoint.CheckpointSave(iterator),
            progress=ocp.args.JsonSave(record),
        )
        with self._writing():
            self._manager.save(step, args=args, force=True)

    def restore[State: DataclassInstance](
        self, abstract_state: State, iterator: Any
    ) -> tuple[State, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        Damaged ones that are newer are named in a warning and moved to `damaged_checkpoints`.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct`s with the shardings to restore onto, which need not be
            those that were saved.
          iterator: a grain iterator of this process; its state is set in place.

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
        if processes.is_first():
            for path in damaged:
                _set_aside(path)
        processes.wait("damaged checkpoints are out of the way")
        return restored

    def wait(self) -> None:
        """Returns when the save in flight is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads."""
        if "_manager" in self.__dict__:
            with self._writing():
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Where it comes out that a checkpoint, begun now or earlier, could not be written."""
        try:
            yield
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and _DISK_ERROR not in str(error):
                raise
            # The writers of the other arrays fail alike, each with a traceback that would follow this error.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            whole = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory} (those that are complete: {whole}); "
                f"valid: a folder with room that can be written to, then start again; {_short(error, 600)}"
            ) from error

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
        # Devices that hold the same array write a slice of it each, for which a program is compiled for every shape;
        # that is worth its time for large arrays only.
        writer = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES
        )
        types = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, writer),
            (np.ndarray, ocp.type_handlers.NumpyHandler()),
            (np.number, ocp.type_handlers.ScalarHandler()),
        )
        handlers = {
            name: ocp.PyTreeCheckpointHandler(type_handler_registry=types) for name in _ARRAY_ITEMS
        }
        registry = ocp.handlers.create_default_handler_registry(**handlers)
        return ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)


def restore_variables(
    workdir: str | Path,
    step: int | None = None,
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[dict[str, Any], int]:
    """The variables that a run would be evaluated with: averaged parameters where it keeps an average.

    Args:
      workdir: of the run.
      step: which checkpoint; None takes the newest that is whole.
      shardings: from the shapes of the parameters to where each of them is to live, such as `state_shardings` of
        `effjax.training.sharding` for a mesh; on several processes all of them call. None: the first device.

    Returns:
      `{"params": ...}`, and the step.

    Raises:
      CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    directory = Path(workdir).absolute() / FOLDER
    steps = _steps(directory)
    if not steps or step not in (None, *steps):
        has = f"has the steps {', '.join(map(str, steps))}" if steps else "has none"
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"{wanted} was asked for, and {directory} {has}")
    read = functools.partial(_read_variables, shardings=shardings or _on_first_device)
    found = _newest_readable(directory, read, None if step is None else [step])
    assert found is not None  # steps is not empty
    return found[0]


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


def _from_items[State: DataclassInstance](like: State, items: Mapping[str, Any]) -> State:
    """The inverse of `_items`, in the structure of `like`."""
    fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    rest = {name: value for name, value in fields.items() if name not in ("params", "ema")}
    rest = jax.tree_util.tree_map_with_path(
        lambda path, _: items["rest"][jax.tree_util.keystr(path)], rest
    )
    return dataclasses.replace(like, params=items["params"], ema=items.get("ema"), **rest)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _newest_readable(directory: Path, read: Any, steps: Sequence[int] | None = None) -> Any:
    """(What `read(step directory)` returns for the newest it can read, the directories it failed on); None if empty."""
    damaged: dict[Path, Exception] = {}
    # A folder on the network may look different to another process for a moment.
    steps = processes.from_first(_steps(directory) if steps is None else steps)
    for step in reversed(steps):
        path = directory / str(step)
        logger.info("reading checkpoint %s", path)
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


def _read_state[State: DataclassInstance](
    path: Path, abstract_state: State, iterator: Any
) -> tuple[State, dict[str, Any]]:
    """What `Checkpoints.restore` returns, or an exception on all processes alike."""
    with _alike():
        record = _record(path)
        items = {
            name: _read_arrays(path / name, tree) for name, tree in _items(abstract_state).items()
        }
        iterator.set_state(_read_data(path / "data"))
        iterator.start_prefetch()
    for name, arrays in items.items():
        _check_digest(arrays, record["digests"][name])
    return _from_items(abstract_state, items), record["progress"]


def _read_data(folder: Path) -> dict[str, Any]:
    """The state of the data of all processes that saved it."""
    files = sorted(folder.glob("process_*-of-*.json"))
    count = int(files[0].stem.rpartition("-")[2]) if files else 1
    if len(files) != count:
        raise CheckpointError(f"{folder} has {len(files)} of the {count} states of its data")
    return data.joined_state(json.loads(file.read_text()) for file in files)


def _read_variables(path: Path, shardings: Callable[[Any], Any]) -> tuple[dict[str, Any], int]:
    with _alike():
        digests = _record(path)["digests"]
        name = "ema" if "ema" in digests else "params"
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
            ocp.StandardCheckpointHandler().metadata(path / name).tree,
        )
        abstract = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            shardings(shapes),
        )
        params = _read_arrays(path / name, abstract)
    _check_digest(params, digests[name])
    return {"params": params}, int(path.name)


def _on_first_device(shapes: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: here, shapes)


@contextlib.contextmanager
def _alike() -> Iterator[None]:
    """What is done inside fails on all processes if it does on one."""
    error = None
    try:
        yield
    except Exception as one:
        error = one
    if not processes.every(error is None):
        raise error or CheckpointError("another process cannot read it")


def _read_arrays(path: Path, abstract: Any) -> Any:
    # Each process reads by itself: one that waited for the others would wait for ever if they fail.
    alone = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=alone, active_processes={alone}, barrier_sync_key_prefix=f"process_{alone}"
    )
    with ocp.StandardCheckpointer(multiprocessing_options=options) as reader:
        return reader.restore(path, abstract)


def _check_digest(arrays: Any, expected: int) -> None:
    if digest(arrays) != expected:
        raise CheckpointError("its arrays are not those that were saved (digests differ)")


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


def _short(error: Exception, length: int = 200) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:length]}"
