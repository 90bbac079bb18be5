"""Rotary frequencies in a config: `rope_theta` with `rope_scaling`, or since transformers 5 `rope_parameters`."""

from typing import Any

from effjax.interop.entries import Entries
from effjax.interop.error import InteropError
from effjax.mixers import Attention

KINDS = ("default", "linear", "llama3")


def read_rope(entries: Entries, theta: float = 10_000.0) -> dict[str, Any]:
    """The rotary fields of `Attention` that a config describes; `theta` is the base if it does not say.

    Raises:
      InteropError: for a kind of scaling that we lack, or one whose numbers are missing.
    """
    entries.only("rope_interleaved", False)
    entries.only("use_mrope", False)
    new = entries.get("rope_parameters", dict | None, None)
    old = entries.get("rope_scaling", dict | None, None)
    theta = entries.get("rope_theta", float, theta)
    scaling = Entries(
        new or old or {}, f"{entries.where}: rope_{'parameters' if new else 'scaling'}"
    )
    fields: dict[str, Any] = {"rope_base": scaling.get("rope_theta", float, theta)}
    kind = scaling.only("rope_type", scaling.only("type", *KINDS), *KINDS)
    if kind != "default":
        fields |= {"rope_scaling": kind, "rope_factor": scaling.get("factor", float)}
    if kind == "llama3":
        fields |= {
            "rope_low_freq_factor": scaling.get("low_freq_factor", float),
            "rope_high_freq_factor": scaling.get("high_freq_factor", float),
            "rope_original_length": scaling.size("original_max_position_embeddings"),
        }
    scaling.only("partial_rotary_factor", 1.0)
    if overlooked := scaling.overlooked():
        raise InteropError(f"{scaling.where}: {overlooked} is not supported with {kind!r}")
    return fields


def write_rope(attention: Attention) -> dict[str, Any]:
    """The entries for the rotary fields, in the form that every version of transformers reads."""
    scaling: dict[str, Any] = {"rope_type": attention.rope_scaling, "factor": attention.rope_factor}
    if attention.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": attention.rope_low_freq_factor,
            "high_freq_factor": attention.rope_high_freq_factor,
            "original_max_position_embeddings": attention.rope_original_length,
        }
    return {
        "rope_theta": attention.rope_base,
        "rope_scaling": None if attention.rope_scaling is None else scaling,
    }
