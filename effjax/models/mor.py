"""Recursive Transformers: parameters shared across depth, the same depth for every token or its own for each."""

from effjax.depth import ExpertChoice, MixtureOfRecursions, Recursive
from effjax.ffn import Gated
from effjax.mixers import Attention
from effjax.models.sequence_model import DecoderLM
from effjax.registry import register


@register("model", "recursive")
def recursive() -> DecoderLM:
    """A Llama-style model whose middle layers are two blocks applied three times (arXiv 2507.10524, section 2.1)."""
    return DecoderLM(
        num_layers=8,
        mixers=(Attention(num_heads=4, num_kv_heads=2),),
        ffn=Gated(),
        depth=Recursive(num_recursions=3, sharing="middle_cycle"),
    )


@register("model", "mor")
def mor() -> DecoderLM:
    """Mixture-of-Recursions in its main setting: middle-cycle sharing, expert choice trained by the auxiliary loss,
    recursion-wise keys and values (Bae et al., 2025, arXiv 2507.10524, section 3).
    """
    return DecoderLM(
        num_layers=8,
        mixers=(Attention(num_heads=4, num_kv_heads=2),),
        ffn=Gated(),
        depth=MixtureOfRecursions(num_recursions=3, sharing="middle_cycle", routing=ExpertChoice()),
    )
