"""Training from a config to a checkpoint, interruptible at any moment.

The loop keeps the devices busy and still knows what they do: it dispatches a step, makes the next batch while the step
runs, and only then fetches the metrics of the step before the last. Every step's metrics are looked at, so a loss that
is not finite is found two steps later at most, and always before a checkpoint is written.

On several processes each runs this loop over its share of the data, and all decide alike, because they decide by sums
over all processes, which come with the metrics. The first process alone writes the log.
"""

import collections
import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax import checkpoint, data, models, optim, processes, registry
from effjax.training import initial, lowering, sharding, stopping
from effjax.training.batches import Share
from effjax.training.metrics import Counts, Interval, MetricsLog
from effjax.training.progress import Screen
from effjax.training.state import TrainState, initialise, initialiser
from effjax.training.validation import Validation

# Steps that are dispatched before the metrics of one are fetched: the devices always have the next one waiting.
_STEPS_IN_FLIGHT = 2
# A batch that takes longer is worth a line: the devices had nothing to do.
_SLOW_BATCH_SECONDS = 10.0


class NonFiniteLossError(ValueError):
    """A loss, gradient or update that is not finite; the message names the step and the last good checkpoint."""


@dataclasses.dataclass
class Progress:
    """What a run knows besides its state: plain numbers, saved with each checkpoint.

    Attributes:
      interval: the metrics since the last line of the log.
      tokens: input tokens seen.
      seconds: time spent in training steps; compiling, evaluating and saving are not counted.
      compile_seconds: time spent compiling the training step.
      wall_seconds: all the time of the starts before this one.
      best_loss: lowest held-out loss so far.
      skipped: steps whose update was left out because it was not finite.
      skipped_in_a_row: those among the last steps.
    """

    interval: Interval = dataclasses.field(default_factory=Interval)
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    wall_seconds: float = 0.0
    best_loss: float | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "interval": Interval(**values["interval"])})


class Run:
    """One run: its parts, its state and its files. A context manager, which ends the threads that read data ahead.

    Attributes:
      model: as the config describes it; `current_model` is what it is at the present step (`at_step`).
      state: the train state.
      step: updates done so far, known without asking the devices.
      progress: see `Progress`.
      share: which rows of each batch this process makes.
    """

    state: TrainState
    step: int
    progress: Progress
    _saved_step: int | None  # of the newest checkpoint
    _heldout: tuple[int | None, float]  # the step at which it was measured last, and the loss

    def __init__(self, config: Mapping[str, Any], workdir: Path, mesh: Mesh, screen: Screen):
        """Builds the parts, and restores the newest checkpoint or initialises.

        Args:
          config: a checked config as plain dicts and tuples.
          workdir: an existing folder.
          mesh: the devices; it and the logical axis rules must be in force (`jax.set_mesh`, `nn.logical_axis_rules`)
            here and in `train`.
          screen: where to say what happens.
        """
        self.config, self.workdir, self.mesh, self.screen = config, workdir, mesh, screen
        self._started = time.perf_counter()
        training = config["training"]
        self.model = models.create(**config["model"])
        self._objective = registry.build("objective", config["objective"])
        self._optimizer, schedule = optim.build(config["optimizer"], training["num_steps"])
        self._schedule = jax.jit(schedule)  # one program, and not one for each of its operations
        self.share = Share.of(mesh, config["data"]["batch_size"])
        self._iterator = self._data("train")
        self._token_num_bytes = data.tokenizer(config["data"]).token_num_bytes
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self._validate = Validation(
            self._objective, self._heldout_batches, self._token_num_bytes, self._replicated
        )
        self._checkpoints = checkpoint.Checkpoints(
            workdir, keep=training["keep"], keep_best=training["keep_best"]
        )
        self._pending: collections.deque = collections.deque()
        self._stop = stopping.StopRequest()
        self._agreed_stop: signal.Signals | None = None
        self._compiled: tuple[Any, Any] | None = None
        self._restore_or_initialise()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self._iterator.close()

    @property
    def current_model(self) -> models.SequenceModel:
        """The model at the present step."""
        return self.model.at_step(self.step)

    @property
    def finished(self) -> bool:
        return self.step >= self.config["training"]["num_steps"]

    @property
    def wall_seconds(self) -> float:
        """All the time that the run has taken, earlier starts included."""
        return self.progress.wall_seconds + time.perf_counter() - self._started

    def train(self) -> signal.Signals | None:
        """Runs to the last step, or until SIGTERM or SIGINT; either way the state is saved on return.

        A signal to one of several processes stops all of them after the same step.

        Returns:
          The signal that came, or None.

        Raises:
          NonFiniteLossError: if the loss or its gradient is not finite, and that is not to be skipped or is too often.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._stop)
            stack.enter_context(self._checkpoints)
            if processes.is_first():
                self._log = stack.enter_context(MetricsLog(self.workdir, last_step=self.step))
            stack.enter_context(self.screen)
            self._schedule(self.step)  # compiled here, and not in the measured time
            self._last_arrival = time.perf_counter()
            while not self.finished and self._stop_signal is None:
                self._advance()
            self._save()
            return self._stop_signal

    @property
    def _stop_signal(self) -> signal.Signals | None:
        """What ends the run before its last step: one process stops at once, several when all know of it."""
        return self._agreed_stop if processes.several() else self._stop.received

    def _advance(self) -> None:
        """One step, and what is due after it."""
        batch, counts = self._next_batch()
        update = self._update_function(batch)
        self.state, metrics = update(self.state, batch)
        self.step += 1
        of_all = processes.summed([*dataclasses.astuple(counts), *self._stop.flags])
        self._pending.append((self.step, metrics, of_all))
        self._collect(_STEPS_IN_FLIGHT)
        improved = self._is_due("eval_every") and self._evaluate()
        if self._is_due("checkpoint_every") or (improved and self.config["training"]["keep_best"]):
            self._save()

    def _is_due(self, interval: str, step: int | None = None) -> bool:
        step = self.step if step is None else step
        training = self.config["training"]
        return step % training[interval] == 0 or step == training["num_steps"]

    def _update_function(self, batch: Any) -> Any:
        """The compiled step for the model as it is now; a model that moved on is compiled anew."""
        model = self.current_model
        if self._compiled is not None and self._compiled[0] == model:
            return self._compiled[1]
        with self._pause():
            start = time.perf_counter()
            traced = lowering.trace(
                model,
                self._objective,
                self._optimizer,
                self.config["training"],
                self.state,
                batch,
                self.mesh,
            )
            compiled = traced.lower().compile()
            seconds = time.perf_counter() - start
        self.progress.compile_seconds += seconds
        self.screen.say(f"step {self.step}: compiled the training step in {seconds:.1f} s")
        self._compiled = (model, compiled)
        return compiled

    def _collect(self, leave: int) -> None:
        """Fetches the metrics of all but the newest `leave` steps, checks them and logs what is due."""
        while len(self._pending) > leave:
            step, metrics, of_all = self._pending.popleft()
            metrics, (*counts, terminated, interrupted) = jax.device_get((metrics, of_all))
            arrival = time.perf_counter()
            counts = Counts.from_sums(counts)
            self._agreed_stop = stopping.first_of((terminated, interrupted)) or self._agreed_stop
            seconds, self._last_arrival = arrival - self._last_arrival, arrival
            self._check_finite(step, metrics)
            self.progress.interval.add(metrics, counts, seconds)
            self.progress.tokens += counts.tokens
            self.progress.seconds += seconds
            self.screen.advance(step)
            if self._is_due("log_every", step) and not self._is_due("eval_every", step):
                self._write_line(step, {})

    def _write_line(self, step: int, heldout: Mapping[str, float]) -> None:
        """Logs a step: the means since the last line where one is due, and held-out metrics if there are any."""
        values, seconds_per_step = dict(heldout), None
        if self._is_due("log_every", step):
            interval = self.progress.interval
            learning_rate = float(self._schedule(step - 1 - self.progress.skipped))
            values = interval.means() | values | interval.rates() | {"learning_rate": learning_rate}
            seconds_per_step = interval.seconds / interval.steps
            self.progress.interval = Interval()
        if processes.is_first():
            self._log.write(step, values)
        self.screen.show(step, values, seconds_per_step)

    def _evaluate(self) -> bool:
        """Measures and logs the held-out metrics; returns whether the loss is the best so far."""
        self._collect(0)
        with self._pause():
            heldout = self._validate(self.current_model, self.state.variables())
        loss, best = heldout["heldout/loss"], self.progress.best_loss
        self._heldout = (self.step, loss)
        self._write_line(self.step, heldout)
        improved = best is None or loss < best
        if improved:
            self.progress.best_loss = loss
        return improved

    def _save(self) -> None:
        """Saves the present state, once its metrics and its arrays are known to be finite."""
        self._collect(0)
        if self._saved_step == self.step:
            return
        with self._pause():
            if processes.is_first():
                self._log.flush()
            record = dataclasses.replace(self.progress, wall_seconds=self.wall_seconds)
            measured_at, loss = self._heldout
            try:
                self._checkpoints.save(
                    self.state,
                    self._iterator,
                    dataclasses.asdict(record),
                    heldout_loss=loss if measured_at == self.step else None,
                )
            except FloatingPointError as error:
                raise NonFiniteLossError(
                    f"the state after step {self.step} is not finite ({error}); {self._last_good()}"
                ) from error
        self._saved_step = self.step

    def _check_finite(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Raises if the run cannot go on with the state after this step; counts the step if it was skipped."""
        progress = self.progress
        if metrics.get("skipped"):
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            most = self.config["training"]["max_skipped"]
            if progress.skipped_in_a_row <= most:
                return
            advice = (
                f"{most} steps before it were skipped (training.max_skipped), and it is no better"
            )
        else:
            progress.skipped_in_a_row = 0
            if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
                return
            advice = "training.nonfinite=skip leaves out such steps"
        offending = [f"{name}={value}" for name, value in metrics.items() if not np.isfinite(value)]
        raise NonFiniteLossError(
            f"step {step}: {', '.join(offending) or 'the update is not finite'}; {self._last_good()}; {advice}; "
            "a lower optimizer.schedule.peak or optimizer.clip_norm may help"
        )

    def _last_good(self) -> str:
        if self._saved_step is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {self._checkpoints.directory / str(self._saved_step)}"

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Takes what happens inside out of the measured training time."""
        self._collect(0)
        yield
        self._last_arrival = time.perf_counter()

    def _restore_or_initialise(self) -> None:
        init = initialiser(self.model, self._optimizer, self.config)
        offload = self.config["training"]["offload_optimizer"]
        abstract = sharding.abstract_state(init, self.mesh, offload)
        restored = self._checkpoints.restore(abstract, self._iterator)
        if restored is None:
            shardings = jax.tree.map(lambda x: x.sharding, abstract)
            params = initial.parameters(self.config, self.model, shardings.params, self.mesh)
            self.state = initialise(init, shardings, params)
            self.progress = Progress()
        else:
            self.state, progress = restored
            self.progress = Progress.from_json(progress)
        self.step = int(self.state.step)
        self._saved_step = None if restored is None else self.step
        self._heldout = (None, float("nan"))

    def _data(self, split: str) -> data.DataIterator:
        return data.build(self.config["data"], split=split, rows=self.share.rows.tolist())

    def _next_batch(self) -> tuple[dict[str, jax.Array], Counts]:
        start = time.perf_counter()
        batch = next(self._iterator)
        waited = time.perf_counter() - start
        if waited > _SLOW_BATCH_SECONDS:
            self.screen.say(f"step {self.step}: waited {waited:.0f} s for a batch")
        counts = Counts.of(self.share.counted_rows(batch), self._token_num_bytes)
        return self.share.on_devices(batch), counts

    def _heldout_batches(self) -> Iterator[dict[str, jax.Array]]:
        batches = self._data("heldout")
        try:
            limit = self.config["training"]["eval_batches"]
            yield from map(self.share.on_devices, itertools.islice(batches, limit))
        finally:
            batches.close()
