"""What a run came to: `summary.json` in the workdir, and a table for its reader."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from effjax.evaluation.report import readable

SUMMARY_FILE = "summary.json"

_UNITS = {
    "tokens_per_second": "input tokens in training, evaluation and compilation not counted",
    "flops_per_token": "forward, what the model really spends",
    "flops_per_token_dense": "forward, with nothing skipped",
    "wall_seconds": "all starts of the run, evaluation included",
    "compile_seconds": "of the training step",
}


def summarise(report: Mapping[str, Any], run: Any) -> dict[str, Any]:
    """The numbers that say how a run went.

    Args:
      report: of the evaluation at its end.
      run: the finished `loop.Run`.

    Returns:
      `heldout_bits_per_byte` beside `unigram_bits_per_byte` and `bigram_bits_per_byte` for a language model of text,
      `retrieval_recall@k` for an embedder, `associative_recall_accuracy` for that task; `params`; `flops_per_token`
      (forward FLOPs per input token that the model spends on held-out text; training takes three times as many) and
      `flops_per_token_dense` (if nothing were skipped); `tokens_per_second` (input tokens in training, without
      compilation and evaluation); `wall_seconds` (of all starts of the run, everything included), and more.
    """
    progress = run.progress
    return {
        "model": report["model"],
        "steps": run.step,
        **_quality(report),
        "params": report["parameters"]["total"],
        "params_active": report["parameters"]["active"],
        "flops_per_token": report["cost"]["flops_per_token"],
        "flops_per_token_dense": report["cost"]["flops_per_token_if_nothing_is_skipped"],
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds,
        "compile_seconds": progress.compile_seconds,
        "wall_seconds": run.wall_seconds,
        "devices": report["devices"],
        "jax": jax.__version__,
    }


def write(workdir: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json`, whole or not at all."""
    path = Path(workdir) / SUMMARY_FILE
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    unfinished.replace(path)


def read(workdir: str | Path) -> dict[str, Any] | None:
    """The summary of a run that has finished, or None."""
    path = Path(workdir) / SUMMARY_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def table(summary: Mapping[str, Any]) -> Table:
    """The summary for a console."""
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_column(style="dim")
    for name, value in summary.items():
        grid.add_row(name, readable(value), _UNITS.get(name, ""))
    return grid


def _quality(report: Mapping[str, Any]) -> dict[str, Any]:
    """How good the model is, by whichever measure suits it."""
    if "retrieval" in report:
        recall = report["retrieval"]
        return {f"retrieval_{k}": v for k, v in recall.items() if k.startswith("recall@")}
    heldout = report["heldout"]
    quality = {"heldout_loss": heldout["loss"], "heldout_bits_per_byte": heldout["bits_per_byte"]}
    if "associative_recall" in report:
        quality["associative_recall_accuracy"] = report["associative_recall"]["accuracy"]
    return quality | heldout.get("baselines", {})
