"""The Matryoshka text embedder."""

from effjax.ffn import Gated
from effjax.heads import Embedding
from effjax.mixers import Attention
from effjax.models.sequence_model import TextEncoder
from effjax.registry import register


@register("model", "matryoshka")
def matryoshka() -> TextEncoder:
    """Bidirectional encoder with mean pooling, for the nested contrastive objective.

    Matryoshka learning (arXiv 2205.13147) changes no weight of the model: the nested dimensions are
    a field of the objective, and an embedding is cut at use by `effjax.heads.truncate`. For
    classification replace the head: `head={"name": "matryoshka_classifier", "num_classes": C}`,
    with `tie_weights` for MRL-E.
    """
    return TextEncoder(
        mixers=(Attention(num_heads=4, causal=False),), ffn=Gated(), head=Embedding()
    )
