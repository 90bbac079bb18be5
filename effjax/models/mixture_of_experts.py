"""Decoders whose feed-forwards are mixtures of experts; all else as in `transformer`."""

from effjax.ffn import AdaMoE, Switch
from effjax.mixers import Attention
from effjax.models.sequence_model import DecoderLM
from effjax.registry import register


@register("model", "switch")
def switch() -> DecoderLM:
    """Switch Transformer (arXiv 2101.03961): one of eight experts a token.

    An expert costs what the feed-forward of `transformer` does, so the two spend the same FLOPs.
    """
    return DecoderLM(mixers=(Attention(num_heads=4, num_kv_heads=2),), ffn=Switch())


@register("model", "adamoe")
def adamoe() -> DecoderLM:
    """AdaMoE (arXiv 2406.13233): four choices among eight true and eight null experts.

    Two true experts a token on average, each as wide as the feed-forward of `transformer`.
    """
    return DecoderLM(mixers=(Attention(num_heads=4, num_kv_heads=2),), ffn=AdaMoE())
