"""Choice of the implementation of an op: by name, or the best that the platform allows.

Every op keeps a table `{name: Implementation}`. `select` looks a name up, or takes the first entry that
serves the platform, and says once per distinct choice at log level INFO what it took and why. Naming an
implementation that cannot run here is an error: there is no silent fallback.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping

import jax

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        function: the implementation, called with the op's validated arguments.
        platforms: the platforms of `jax.default_backend()` that it runs on ("cpu", "tpu", "gpu"); None for all.
        automatic: whether `implementation=None` may take it.
    """

    function: Callable
    platforms: tuple[str, ...] | None = None
    automatic: bool = True

    def runs_on(self, platform: str) -> bool:
        return self.platforms is None or platform in self.platforms


def select(op: str, table: Mapping[str, Implementation], implementation: str | None) -> Callable:
    """Returns the function of `implementation`, or of the best one for this platform where it is None.

    Args:
        op: name of the op, for messages.
        table: the op's implementations, the preferred ones first.
        implementation: a key of `table`, or None.

    Raises:
        ValueError: the name is unknown, or cannot run on this platform.
    """
    platform = jax.default_backend()
    here = [name for name, entry in table.items() if entry.runs_on(platform)]
    if implementation is None:
        name = next(name for name in here if table[name].automatic)
        _log_once(op, name, f"the first of {here} that serves platform {platform!r}")
        return table[name].function
    if implementation not in here:
        why = (
            f"runs on {list(table[implementation].platforms)} only"
            if implementation in table
            else "is unknown"
        )
        raise ValueError(
            f"{op}: implementation={implementation!r} {why}; on platform {platform!r} there is {here}"
        )
    _log_once(op, implementation, "named by the caller")
    return table[implementation].function


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s: implementation %r (%s)", op, name, reason)
