"""Attention to the last few tokens only."""

from effjax.mixers.attention import Attention
from effjax.registry import register


@register("mixer", "sliding_window")
class SlidingWindow(Attention):
    """Causal attention to a token itself and the `window - 1` before it (Beltagy et al., 2020, arXiv 2004.05150).

    Its decode state is a ring of `window` slots, so time and memory a token are constant. BASED uses windows of
    16 to 128 (Arora et al., 2024, arXiv 2402.18668, section 4).
    """

    window: int | None = 64
