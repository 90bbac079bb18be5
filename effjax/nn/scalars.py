"""What a part reports beside its output: a flat dict from name to array.

    loss/...    scalar, already weighted; the objective adds it
    flops/...   scalar, forward FLOPs per input token: `flops/spent` by this batch, `flops/full` with nothing skipped
    token/...   [B, T], per token, for pictures (recursion depth, experts used)
    others      scalar metrics (fraction dropped, router entropy, ...)

Layers in sequence add the first three and average the last.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array

Scalars = dict[str, Array]

_ADDED = ("loss/", "flops/", "token/")


def combine(reports: Sequence[Scalars]) -> Scalars:
    """The report of a sequence of layers; a metric that only some layers have is averaged over those."""
    names = dict.fromkeys(name for report in reports for name in report)
    combined = {}
    for name in names:
        values = [report[name] for report in reports if name in report]
        total = sum(values[1:], start=values[0])
        combined[name] = total if name.startswith(_ADDED) else total / len(values)
    return combined


def collapse(stacked: Scalars) -> Scalars:
    """The report of layers whose reports `lax.scan` has stacked along a leading axis."""
    return {
        name: jnp.sum(value, axis=0) if name.startswith(_ADDED) else jnp.mean(value, axis=0)
        for name, value in stacked.items()
    }


def losses(report: Mapping[str, Array]) -> Scalars:
    """The entries that the objective adds to the loss."""
    return {name: value for name, value in report.items() if name.startswith("loss/")}


def metrics(report: Mapping[str, Array]) -> Scalars:
    """The entries that are for looking at."""
    return {name: value for name, value in report.items() if not name.startswith("loss/")}


def flops(spent: float | Array, full: float | Array | None = None) -> Scalars:
    """Forward FLOPs per input token of a part; `full` defaults to `spent`, for parts that skip nothing."""
    return {
        "flops/spent": jnp.asarray(spent, jnp.float32),
        "flops/full": jnp.asarray(spent if full is None else full, jnp.float32),
    }
