"""Which layers see only a window: `layer_types` with an entry a layer, or what older configs say instead."""

from typing import Any

from effjax.interop.entries import Entries
from effjax.interop.error import InteropError
from effjax.mixers import Attention
from effjax.models import SequenceModel

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(entries: Entries, older: list[str]) -> list[str]:
    """`FULL` or `SLIDING` for each layer; `older` is what a config without the entry means.

    Raises:
      InteropError: for a kind of layer that we lack, or a list of another length than the layers.
    """
    num_layers = entries.size("num_hidden_layers")
    given = entries.get("layer_types", list | None, None)
    types = older if given is None else given
    if len(types) != num_layers or not {*types} <= {FULL, SLIDING}:
        raise InteropError(
            f"{entries.where}: layer_types={types}; valid: {FULL!r} or {SLIDING!r} for each of the {num_layers} layers"
        )
    return types


def read_qwen_windows(entries: Entries) -> list[int | None]:
    """The window of each layer, None where it sees everything: older configs have one from `max_window_layers` on.

    Raises:
      InteropError: as `read_layer_types`, or if layers slide without a window.
    """
    num_layers = entries.size("num_hidden_layers")
    window = entries.get("sliding_window", int | None, 4096)
    first = entries.get("max_window_layers", int | None, 28)
    if not entries.get("use_sliding_window", bool, False):
        window = None
    is_full = [window is None or first is None or i < first for i in range(num_layers)]
    types = read_layer_types(entries, [FULL if full else SLIDING for full in is_full])
    if SLIDING in types and window is None:
        raise InteropError(
            f"{entries.where}: layer_types={types} without a window; valid: use_sliding_window, and sliding_window"
        )
    return [window if kind == SLIDING else None for kind in types]


def write_qwen_windows(model: SequenceModel) -> dict[str, Any]:
    """The entries of `read_qwen_windows`."""
    windows = [mixer.window for mixer in model.mixers]
    in_use = [window for window in windows if window is not None]
    return {
        **write_layer_types(model),
        "max_window_layers": windows.index(in_use[0]) if in_use else len(windows),
        "sliding_window": in_use[0] if in_use else None,
        "use_sliding_window": bool(in_use),
    }


def write_layer_types(model: SequenceModel) -> dict[str, Any]:
    """The entry of `read_layer_types`."""
    return {"layer_types": [FULL if m.window is None else SLIDING for m in model.mixers]}


def pattern(mixers: list[Attention]) -> tuple[Attention, ...]:
    """The shortest pattern that, repeated, gives the mixer of every layer."""
    for size in range(1, len(mixers)):
        if all(mixer == mixers[i % size] for i, mixer in enumerate(mixers)):
            return tuple(mixers[:size])
    return tuple(mixers)
