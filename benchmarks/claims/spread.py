"""Numbers over seeds: rows of JSON with `model`, `seed` and what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims.claim import Table

Runs = Sequence[Mapping[str, Any]]


def names(runs: Runs) -> list[str]:
    """The models, in the order of their first run."""
    return list(dict.fromkeys(run["model"] for run in runs))


def values(runs: Runs, model: str, key: str) -> list[float]:
    """A measure of all runs of a model."""
    return [run[key] for run in runs if run["model"] == model]


def mean(runs: Runs, model: str, key: str) -> float:
    """Over the seeds."""
    return statistics.fmean(values(runs, model, key))


def deviation(numbers: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def cell(numbers: Sequence[float], form: str = ".3f") -> str:
    """Mean ± standard deviation over the seeds; the number alone if it is the same for all."""
    middle = format(statistics.fmean(numbers), form)
    spread = format(deviation(numbers), form.lstrip("+"))
    return middle if len(set(numbers)) == 1 else f"{middle} ± {spread}"


def table(runs: Runs, columns: Mapping[str, tuple[str, str]]) -> Table:
    """A row a model.

    Args:
      runs: the runs.
      columns: key of a measure and its format, by the head of the column.
    """
    rows = []
    for model in names(runs):
        cells = [cell(values(runs, model, key), form) for key, form in columns.values()]
        rows.append((model, str(sum(run["model"] == model for run in runs)), *cells))
    return Table(("model", "seeds", *columns), rows)


def points(runs: Runs, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Two measures of each run, by model."""
    keys = (x, y)
    return {
        name: list(zip(*(values(runs, name, key) for key in keys), strict=True))
        for name in names(runs)
    }


def differences(runs: Runs, model: str, baseline: str, key: str) -> list[float]:
    """Model less baseline, seed by seed: both see the same text in the same order.

    Raises:
      ValueError: if they have no seed in common.
    """
    of = [
        {run["seed"]: run[key] for run in runs if run["model"] == name}
        for name in (model, baseline)
    ]
    both = sorted(of[0].keys() & of[1].keys())
    if not both:
        raise ValueError(f"{model!r} and {baseline!r} have no seed in common")
    return [of[0][seed] - of[1][seed] for seed in both]


def bits_against(runs: Runs, model: str, baseline: str, key: str) -> str:
    """The differences of a measure in bits per byte, in words."""
    return (
        f"{cell(differences(runs, model, baseline, key), '+.3f')} bits per byte against {baseline}"
    )


def is_lower(runs: Runs, model: str, baseline: str, key: str) -> bool:
    """Whether the model is below the baseline with every seed."""
    return all(x < 0 for x in differences(runs, model, baseline, key))


def is_level(runs: Runs, model: str, baseline: str, key: str, share: float = 0.01) -> bool:
    """Whether the model is, in the mean, at most that share of the baseline above it."""
    allowed = share * mean(runs, baseline, key)
    return statistics.fmean(differences(runs, model, baseline, key)) <= allowed


def is_no_higher(runs: Runs, model: str, baseline: str, key: str) -> bool:
    """Whether the model is, in the mean, at most one standard deviation of the baseline's seeds above it."""
    allowed = deviation(values(runs, baseline, key))
    return statistics.fmean(differences(runs, model, baseline, key)) <= allowed
