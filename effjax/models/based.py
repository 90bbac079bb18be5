"""BASED: most layers see three tokens, some a window, some everything through a small state."""

from effjax.ffn import Gated
from effjax.mixers import ShortConv, SlidingWindow, TaylorLinear
from effjax.models.sequence_model import DecoderLM
from effjax.registry import register


@register("model", "based")
def based() -> DecoderLM:
    """BASED (Arora et al., 2024, arXiv 2402.18668): convolution, linear attention, window, convolution, convolution.

    Of every five layers three are gated short convolutions, the second is linear attention and the third a sliding
    window, as in the authors' 360M model: 27 layers, counted from 0 linear attention in 1, 6, 11, 16, 21 and windows in
    2, 7, 12, 17, 22; width 1024, 16 heads, feature_dim 16, windows of 64 tokens back, SwiGLU of width 2 d_model behind
    every mixer. Two dials trade recall against memory (`effjax.models.state_size`): `mixers[1].feature_dim` and
    `mixers[2].window`.
    """
    conv = ShortConv()
    return DecoderLM(
        num_layers=5, mixers=(conv, TaylorLinear(), SlidingWindow(), conv, conv), ffn=Gated()
    )
