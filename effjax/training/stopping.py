"""Ending a run from outside without losing work."""

import signal
import threading
from collections.abc import Sequence

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Turns SIGTERM and SIGINT (Ctrl-C) into a flag that the training loop reads between steps.

    A context manager. The first signal sets the flag and puts the previous handlers back, so a second one acts at once.
    Only the main thread of a process may handle signals; elsewhere this does nothing.

    Attributes:
      received: the signal that came, or None.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous = {}

    @property
    def flags(self) -> list[bool]:
        """Of each of `SIGNALS`, whether it came; what processes add up so that all know it."""
        return [self.received == number for number in SIGNALS]

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore_handlers()

    def _receive(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def first_of(flags: Sequence[float]) -> signal.Signals | None:
    """The first of `SIGNALS` whose flag is up, in one process or in the sum of several."""
    return next((number for number, flag in zip(SIGNALS, flags, strict=True) if flag), None)
