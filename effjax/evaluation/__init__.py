"""Evaluation: held-out loss, recall, retrieval, cost, and a report with plots of all of it.

report = effjax.evaluation.evaluate(None, "runs/mor")
"""

from effjax.evaluation.continuation import continue_text
from effjax.evaluation.run import evaluate, evaluate_variables

__all__ = ["continue_text", "evaluate", "evaluate_variables"]
