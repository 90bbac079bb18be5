"""Planning: what a config needs and how fast it is on a machine that need not be here.

found = planning.plan(config, "v5p:8x8x8")
print(found.verdict)
"""

from effjax.training.planning.command import run
from effjax.training.planning.decoding_step import plan_decoding
from effjax.training.planning.memory import Memory
from effjax.training.planning.ranking import candidates, search
from effjax.training.planning.result import Pace, Plan, Work
from effjax.training.planning.training_step import plan

__all__ = [
    "Memory",
    "Pace",
    "Plan",
    "Work",
    "candidates",
    "plan",
    "plan_decoding",
    "run",
    "search",
]
