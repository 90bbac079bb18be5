"""Sequence mixers: `(x[B, T, D], *, positions, segment_ids, state=None) -> (y[B, T, D], state)`."""

from effjax.mixers.attention import Attention, KVState
from effjax.mixers.causal_conv import ConvState
from effjax.mixers.mamba import Mamba, MambaState
from effjax.mixers.mamba2 import Mamba2
from effjax.mixers.paged_kv import PagedKVState
from effjax.mixers.recurrent_state import RecurrentState
from effjax.mixers.short_conv import ShortConv
from effjax.mixers.sliding_window import SlidingWindow
from effjax.mixers.taylor_linear import TaylorLinear
from effjax.mixers.tentative import Tentative, TentativeState

__all__ = [
    "Attention",
    "ConvState",
    "KVState",
    "Mamba",
    "Mamba2",
    "MambaState",
    "PagedKVState",
    "RecurrentState",
    "ShortConv",
    "SlidingWindow",
    "TaylorLinear",
    "Tentative",
    "TentativeState",
]
