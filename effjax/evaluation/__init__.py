"""Evaluation: held-out loss, recall, retrieval, cost, and a report with plots of all of it.

report = effjax.evaluation.evaluate(None, "runs/mor")
"""

from effjax.evaluation.continuation import continue_text
from effjax.evaluation.run import Restored, evaluate, evaluate_variables, restore

__all__ = ["Restored", "continue_text", "evaluate", "evaluate_variables", "restore"]
