"""Reading from a source that may fail for a while: a disk on the network, a server far away."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

logger = logging.getLogger(__name__)


class DataSourceError(ValueError):
    """A source could not be read, however often it was tried; the message says what and why."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How often a failed read is tried again.

    Attributes:
      retries: tries after the first.
      seconds: wait before the first of them; doubled before each that follows.
    """

    retries: int
    seconds: float

    def call[Result](
        self,
        read: Callable[[], Result],
        what: str,
        failures: tuple[type[Exception], ...] = (OSError,),
        reopen: Callable[[], None] = lambda: None,
    ) -> Result:
        """The result of `read`, which may fail in between.

        Args:
          read: reads; called again after a failure.
          what: is read, for messages.
          failures: exceptions that may pass; others are raised as they are.
          reopen: called before `read` is called again; may fail like it.

        Raises:
          DataSourceError: if every try has failed.
        """
        wait = self.seconds
        try:
            return read()
        except failures as error:
            last = error
        for number in range(self.retries):
            logger.warning(
                "%s cannot be read (%s); retry %d of %d in %g s",
                what, _short(last), number + 1, self.retries, wait,
            )  # fmt: skip
            time.sleep(wait)
            wait *= 2
            try:
                reopen()
                return read()
            except failures as error:
                last = error
        raise DataSourceError(
            f"{what} could not be read in {1 + self.retries} tries ({_short(last)}); "
            "valid: a source that can be read, or more data.retries"
        ) from last


NO_PATIENCE = Patience(retries=0, seconds=0.0)


class RandomAccess[Item](Protocol):
    """Items by their number, as grain asks for them: a sequence without slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...

    def __iter__(self) -> Iterator[Item]: ...


class Retried[Item]:
    """Random-access items that are tried again when they cannot be read. A grain random-access source."""

    def __init__(self, items: RandomAccess[Item], patience: Patience, source: str):
        """Wraps `items`; `source` names them in messages."""
        self._items, self._patience, self._source = items, patience, source

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        what = f"data: item {index} of source {self._source}"
        return self._patience.call(lambda: self._items[index], what)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return repr(self._items)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
