"""Choice of the implementation of an op: by name, or the best that the device and the arguments allow.

Every op keeps a table `{name: Implementation}`. `select` looks a name up, or takes the first entry that serves the
device and the arguments, and says once per distinct choice at log level INFO what it took and why. Naming an
implementation that cannot run here is an error: there is no silent fallback.
"""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import jax

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """What a program is traced for.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: as `jax.Device.device_kind` says, "TPU v5 lite" or "NVIDIA H200".
    """

    platform: str
    device_kind: str


def target() -> Target:
    """The devices of the mesh in use (`jax.set_mesh`), which need not be here; without a mesh the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        device = jax.devices()[0]
    return Target(
        "gpu" if device.platform in ("cuda", "rocm") else device.platform, device.device_kind
    )


def _refuses_nothing(*arguments, **options) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        function: the implementation, called with the op's validated arguments.
        platforms: the platforms that it runs on ("cpu", "tpu", "gpu"); None for all.
        automatic: whether `implementation=None` may take it.
        refuses: called with the same arguments; says what about them the implementation cannot do, or returns None.
    """

    function: Callable
    platforms: tuple[str, ...] | None = None
    automatic: bool = True
    refuses: Callable[..., str | None] = _refuses_nothing

    def runs_on(self, platform: str) -> bool:
        return self.platforms is None or platform in self.platforms


def kernels_or_xla(
    tpu: str,
    xla: ModuleType,
    reference: ModuleType,
    op: str,
    gpu: str | None = None,
    triton: str | None = None,
) -> dict[str, Implementation]:
    """The table of an op with kernels for TPU: those, XLA elsewhere, the reference, and the kernels interpreted.

    Args:
        tpu: name of the module with the kernels, the function `op`, which takes `interpret`, and `refuses`. It is
            imported when it is used, because Pallas takes longer to import than all else here.
        xla, reference: modules with the function `op`.
        op: name of the function.
        gpu: name of a module like `tpu`, where there are kernels for GPU.
        triton: name of a module like `tpu`, where there are Triton kernels; it may import Triton and jax_triton, which
            are extras.
    """
    table = {"tpu": _imported_later(tpu, op, ("tpu",))}
    if gpu is not None:
        table["gpu"] = on_gpu(gpu, op)
    if triton is not None:
        kernels = on_gpu(triton, op)
        table["triton"] = dataclasses.replace(
            kernels, refuses=_refuses_without_triton(kernels.refuses)
        )
    table["xla"] = Implementation(getattr(xla, op))
    table["reference"] = Implementation(getattr(reference, op))
    for name in ("tpu", "gpu", "triton"):
        if name in table:
            table[f"{name}_interpret"] = interpreted(table[name])
    return table


def on_gpu(module: str, op: str) -> Implementation:
    """The kernels for GPU in a module, which is imported when they are used.

    They have been interpreted and compiled for GPUs, but not yet run or timed on one, and so have to be named.
    """
    return dataclasses.replace(_imported_later(module, op, ("gpu",)), automatic=False)


def interpreted(kernels: Implementation) -> Implementation:
    """Kernels run by an interpreter, on any platform."""
    function = functools.partial(kernels.function, interpret=True)
    return dataclasses.replace(kernels, function=function, platforms=None, automatic=False)


def _imported_later(module: str, op: str, platforms: tuple[str, ...]) -> Implementation:
    """What the functions `op` and `refuses` of a module are, which the first call of one imports."""
    return Implementation(_later(module, op), platforms, refuses=_later(module, "refuses"))


def _later(module: str, name: str) -> Callable:
    """The function `name` of a module that its first call imports."""

    def function(*arguments, **options):
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return function


def _refuses_without_triton(refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """`refuses`, which can be asked only where its module can be imported."""

    def function(*arguments, **options) -> str | None:
        if importlib.util.find_spec("jax_triton") is None:
            return "jax_triton is not installed: pip install 'effjax[triton]'"
        return refuses(*arguments, **options)

    return function


def select(
    op: str,
    table: Mapping[str, Implementation],
    implementation: str | None,
    *arguments,
    **options,
) -> Callable:
    """Returns the function of `implementation`, or of the best one for this device where it is None.

    Args:
        op: name of the op, for messages.
        table: the op's implementations, the preferred ones first.
        implementation: a key of `table`, or None.
        *arguments: what the function will be called with; so is `**options`.

    Raises:
        ValueError: the name is unknown, cannot run on this platform, or cannot do this.
    """
    platform, kind = target()
    here = [name for name, entry in table.items() if entry.runs_on(platform)]
    if implementation is None:
        passed_over = []
        for name in here:
            reason = table[name].refuses(*arguments, **options)
            if table[name].automatic and reason is None:
                break
            if table[name].automatic:
                passed_over.append(f"; {name!r} cannot: {reason}")
        _log_once(op, name, f"the first of {here} for {kind!r}{''.join(passed_over)}")
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
    reason = table[implementation].refuses(*arguments, **options)
    if reason is not None:
        raise ValueError(f"{op}: implementation={implementation!r} cannot: {reason}")
    _log_once(op, implementation, "named by the caller")
    return table[implementation].function


def call(op: str, table: Mapping, implementation: str | None, *arguments, **options):
    """Calls what `select` returns with the arguments."""
    return select(op, table, implementation, *arguments, **options)(*arguments, **options)


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s: implementation %r (%s)", op, name, reason)
