"""Sequence mixers: `(x[B, T, D], *, positions, segment_ids, state=None) -> (y[B, T, D], state)`."""

from effjax.mixers.attention import Attention, KVState
from effjax.mixers.short_conv import ConvState, ShortConv
from effjax.mixers.sliding_window import SlidingWindow
from effjax.mixers.taylor_linear import LinearState, TaylorLinear

__all__ = [
    "Attention",
    "ConvState",
    "KVState",
    "LinearState",
    "ShortConv",
    "SlidingWindow",
    "TaylorLinear",
]
