"""The named models: each function is the whole definition of one."""

from effjax.ffn import Gated
from effjax.mixers import Attention
from effjax.models.sequence_model import DecoderLM
from effjax.registry import register


@register("model", "transformer")
def transformer() -> DecoderLM:
    """Llama-style baseline: RMSNorm, rotary, SwiGLU, grouped-query attention (arXiv 2302.13971, 2307.09288)."""
    return DecoderLM(mixers=(Attention(num_heads=4, num_kv_heads=2),), ffn=Gated())
