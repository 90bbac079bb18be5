"""Batches made ahead in a thread that ends before the interpreter does."""

import atexit
import weakref

import grain


class PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """grain's thread prefetch, made safe at the end of a program.

    Its thread is a daemon: one that is inside grain's C++ code when the interpreter goes down takes
    the whole process with it ("terminate called without an active exception"). So every iterator
    that is still alive is closed at exit.
    """

    def __init__(self, batches: grain.DatasetIterator, buffer_size: int):
        """Makes `buffer_size` batches ahead; 0 makes each when it is asked for."""
        super().__init__(batches, buffer_size)
        _alive.add(self)

    def close(self) -> None:
        # Once only: it is called again by the garbage collector, maybe with grain already gone.
        if not self._closed:
            super().close()


_alive: weakref.WeakSet[PrefetchIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in tuple(_alive):
        iterator.close()
