"""State-space models: every layer is one recurrence, and decoding remembers the same however long the text."""

from effjax.mixers import Mamba, Mamba2
from effjax.models.sequence_model import DecoderLM
from effjax.registry import register


@register("model", "mamba")
def mamba() -> DecoderLM:
    """Mamba blocks and nothing else (Gu and Dao, 2023, arXiv 2312.00752, section 3.4)."""
    return DecoderLM(num_layers=6, mixers=(Mamba(),), ffn=None)


@register("model", "mamba2")
def mamba2() -> DecoderLM:
    """Mamba-2 blocks and nothing else (Dao and Gu, 2024, arXiv 2405.21060, section 7)."""
    return DecoderLM(num_layers=6, mixers=(Mamba2(head_dim=32, state_dim=32),), ffn=None)
