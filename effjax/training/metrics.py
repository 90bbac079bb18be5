"""From the metrics of single steps to the lines of a log: `metrics.jsonl` and TensorBoard in the workdir."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
# Lines that come sooner after one another go to TensorBoard together: each time, tensorboardX waits for the disk.
_TENSORBOARD_SECONDS = 2.0

LN2 = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is in some rows of a batch.

    Attributes:
      positions: places for input tokens, padding included; what the arithmetic is spent on.
      tokens: input tokens.
      targets: tokens to predict.
      bytes: bytes of text that the targets stand for.
    """

    positions: int
    tokens: int
    targets: float = 0.0
    bytes: float = 0.0

    @classmethod
    def of(cls, batch: Mapping[str, np.ndarray], token_num_bytes: np.ndarray) -> "Counts":
        """Counts a batch of language modelling, or of any other task with token and segment id arrays."""
        segment_ids = [array for name, array in batch.items() if name.endswith("segment_ids")]
        positions = sum(array.size for array in segment_ids)
        tokens = int(sum(np.count_nonzero(array) for array in segment_ids))
        if "loss_mask" not in batch:
            return cls(positions, tokens)
        mask = batch["loss_mask"].astype(np.float64)
        num_bytes = np.sum(mask * token_num_bytes[batch["targets"]])
        return cls(positions, tokens, float(mask.sum()), float(num_bytes))

    @classmethod
    def from_sums(cls, values: Sequence[float]) -> "Counts":
        """The inverse of `dataclasses.astuple`, whatever type the numbers have taken on the way."""
        positions, tokens, targets, num_bytes = map(float, values)
        return cls(int(positions), int(tokens), targets, num_bytes)


@dataclasses.dataclass
class Interval:
    """Running means of the steps since the last line of the log.

    All fields are plain numbers: a checkpoint between two lines carries them as JSON, exactly.

    Attributes:
      steps: how many there were, those that were skipped included.
      skipped: how many were skipped, and count in no mean.
    """

    steps: int = 0
    skipped: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    nats: float = 0.0
    bytes: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, metrics: Mapping[str, Any], counts: Counts, seconds: float) -> None:
        """Adds one step: its scalar metrics, its batch, and how long it took."""
        self.steps += 1
        self.seconds += seconds
        if metrics.get("skipped"):
            self.skipped += 1
            return
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.nats += float(metrics.get("cross_entropy", 0.0)) * counts.targets
        self.bytes += counts.bytes
        self.tokens += counts.tokens
        # A backward pass multiplies twice where the forward pass multiplies once (arXiv 2001.08361, section 2.1).
        self.flops += 3.0 * float(metrics.get("flops/spent", 0.0)) * counts.positions

    def means(self) -> dict[str, float]:
        """The mean of each metric over the steps; bits per byte over all their text; the number of skipped steps."""
        means = {name: total / (self.steps - self.skipped) for name, total in self.sums.items()}
        if self.skipped or "skipped" in means:
            means["skipped"] = self.skipped
        if self.bytes:
            means["bits_per_byte"] = self.nats / LN2 / self.bytes
        return means

    def rates(self) -> dict[str, float]:
        """Tokens and floating-point operations a second, recomputation not counted; empty without a measured time."""
        if not self.seconds:
            return {}
        rates = {"tokens_per_second": self.tokens / self.seconds}
        if self.flops:
            rates["flops_per_second"] = self.flops / self.seconds
        return rates


class MetricsLog:
    """Writes one JSON object a logged step, and the same numbers for TensorBoard.

    A context manager. Opening it for a run that goes on drops the lines after the step it goes on from, so that no step
    is missing or there twice.
    """

    def __init__(self, workdir: str | Path, *, last_step: int):
        """Opens the log of `workdir`, keeping the lines up to `last_step`."""
        # Not its SummaryWriter: when the thread in which that writes fails, as on a full disk, it blocks its caller.
        from tensorboardX.event_file_writer import EventsWriter  # slow to import
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = Path(workdir) / METRICS_FILE
        lines = [json.dumps(line) + "\n" for line in read(workdir) if line["step"] <= last_step]
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("".join(lines))
        unfinished.replace(self.path)
        self._file = self.path.open("a")
        folder = self.path.with_name(TENSORBOARD_FOLDER)
        folder.mkdir(exist_ok=True)
        self._tensorboard = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # Hides what an earlier start wrote of later steps.
        start = SessionLog(status=SessionLog.START)
        self._tensorboard.write_event(Event(step=last_step + 1, session_log=start))
        self._flushed = time.monotonic()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for file in (self._file, self._tensorboard):
            try:
                file.close()
            except OSError:  # a line that could not be written is tried once more
                if kind is None:
                    raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line; a value that is not finite is null in it, as JSON has no such numbers."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        summary = Summary(
            value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        with self._naming_the_file():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            self._tensorboard.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > _TENSORBOARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hands TensorBoard the lines that it has not seen yet; a run does so before each checkpoint."""
        with self._naming_the_file():
            self._tensorboard.flush()
        self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log so far; what a kill left of a half-written one is not a line."""
    path = Path(workdir) / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
