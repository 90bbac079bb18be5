"""BERT-type encoders, for embeddings: bidirectional, norms after the residual sum, one vector a text.

The pooler of BERT's own pre-training task comes along where a checkpoint has one. The vector is the mean over the text,
as sentence encoders have it, unless the config has an entry of ours, `pooling`: "first", "last", or "pooler".
"""

from collections.abc import Container
from typing import Any

from effjax.depth import Plain
from effjax.ffn import Dense
from effjax.heads import Embedding
from effjax.heads.embedding import POOLER, POOLINGS
from effjax.interop.architecture import Architecture, part_of
from effjax.interop.entries import Entries
from effjax.interop.families.decoder import read_activation, write_activation
from effjax.interop.table import Row, linear, norm
from effjax.mixers import Attention
from effjax.models import SequenceModel, TextEncoder
from effjax.nn import LayerNorm, TokenEmbedding

_LAYER = "encoder.layer.{layer}."

_TABLE = (
    Row("embeddings.word_embeddings.weight", "embed/embedding"),
    Row("embeddings.position_embeddings.weight", "embed/position"),
    Row("embeddings.token_type_embeddings.weight", "embed/type"),
    *norm("embeddings.LayerNorm", "embed/out_norm"),
    *linear(f"{_LAYER}attention.self.query", "mixer/query"),
    *linear(f"{_LAYER}attention.self.key", "mixer/key"),
    *linear(f"{_LAYER}attention.self.value", "mixer/value"),
    *linear(f"{_LAYER}attention.output.dense", "mixer/out"),
    *norm(f"{_LAYER}attention.output.LayerNorm", "mixer_norm"),
    *linear(f"{_LAYER}intermediate.dense", "ffn/up"),
    *linear(f"{_LAYER}output.dense", "ffn/down"),
    *norm(f"{_LAYER}output.LayerNorm", "ffn_norm"),
    *linear(f"{POOLER}.dense", "head/pooler"),
)


def _read(entries: Entries) -> TextEncoder:
    entries.only("position_embedding_type", "absolute")
    entries.only("is_decoder", False)
    entries.get("tie_word_embeddings", bool, True)  # of a head that it has not
    layer_norm = LayerNorm(epsilon=entries.get("layer_norm_eps", float, 1e-12))
    return TextEncoder(
        vocab_size=entries.size("vocab_size"),
        d_model=entries.size("hidden_size"),
        num_layers=entries.size("num_hidden_layers"),
        mixers=(
            Attention(
                entries.size("num_attention_heads"),
                causal=False,
                qkv_bias=True,
                out_bias=True,
                rope_base=None,
            ),
        ),
        ffn=Dense(
            hidden_dim=entries.size("intermediate_size"),
            activation=read_activation(entries, "hidden_act", "gelu"),
            use_bias=True,
        ),
        head=Embedding(entries.only("pooling", "mean", *POOLINGS, POOLER)),
        norm=layer_norm,
        norm_order="post",
        embed=TokenEmbedding(
            learned_positions=True,
            num_types=entries.get("type_vocab_size", int, 2),
            norm=layer_norm,
        ),
        max_seq_len=entries.size("max_position_embeddings"),
    )


def _with_pooler(model: SequenceModel, names: Container[str]) -> SequenceModel:
    has_pooler = f"{POOLER}.dense.weight" in names
    return model.clone(head=model.head.clone(pooler=True)) if has_pooler else model


def _write(model: SequenceModel) -> dict[str, Any]:
    ffn, pooling = part_of(model.ffn, Dense), model.head.pooling
    return {
        **({} if pooling == "mean" else {"pooling": pooling}),
        "hidden_act": write_activation(ffn.activation),
        "hidden_size": model.d_model,
        "intermediate_size": ffn.hidden_dim,
        "layer_norm_eps": model.norm.epsilon,
        "max_position_embeddings": model.max_seq_len,
        "num_attention_heads": model.mixers[0].num_heads,
        "num_hidden_layers": model.num_layers,
        "type_vocab_size": model.embed.num_types,
        "vocab_size": model.vocab_size,
    }


ARCHITECTURES = (
    Architecture(
        "BertModel",
        "bert",
        table=_TABLE,
        read=_read,
        write=_write,
        parts={
            "mixers": (Attention,),
            "ffn": (Dense,),
            "depth": (Plain,),
            "head": (Embedding,),
            "norm": (LayerNorm,),
            "embed": (TokenEmbedding,),
        },
        unused=("embeddings.position_ids",),
        # As part of a model with a head, and as converted from TensorFlow.
        renamed=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
        complete=_with_pooler,
    ),
)
