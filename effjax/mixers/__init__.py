"""Sequence mixers: `(x[B, T, D], *, positions, segment_ids, state=None) -> (y[B, T, D], state)`."""

from effjax.mixers.attention import Attention, KVState
from effjax.mixers.sliding_window import SlidingWindow

__all__ = ["Attention", "KVState", "SlidingWindow"]
