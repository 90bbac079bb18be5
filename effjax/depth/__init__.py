"""Depth policies: which token passes which block of the stack, and how often.

`(stack, x[B, T, D], *, positions, segment_ids, state=None, train=False) -> (x, state, aux)`; the state of
`init_state(stack, batch_size, max_length, d_model, dtype)` holds what each block remembers for each time it is applied.
"""

from effjax.depth.block import Block
from effjax.depth.depthwise import Depthwise, Journey
from effjax.depth.expert_choice import ExpertChoice
from effjax.depth.mixture_of_recursions import MixtureOfRecursions
from effjax.depth.plain import Plain
from effjax.depth.recursive import Recursive
from effjax.depth.stack import Stack, fresh
from effjax.depth.token_choice import TokenChoice

__all__ = [
    "Block",
    "Depthwise",
    "ExpertChoice",
    "Journey",
    "MixtureOfRecursions",
    "Plain",
    "Recursive",
    "Stack",
    "TokenChoice",
    "fresh",
]
