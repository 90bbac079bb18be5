"""What the configs of decoders have in common: widths, depths, heads, and the names of activations."""

from typing import Any

import flax.linen as nn

from effjax.depth import Plain
from effjax.ffn import Gated, TopK
from effjax.heads import Tied, Untied
from effjax.interop.architecture import part_of
from effjax.interop.entries import Entries
from effjax.interop.families.rope import write_rope
from effjax.interop.table import Row, linear
from effjax.mixers import Attention
from effjax.models import DecoderLM, SequenceModel
from effjax.nn import RMSNorm

# Their names of nonlinearities; of several for one, the first is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
}

PARTS = {"mixers": (Attention,), "depth": (Plain,), "head": (Tied, Untied), "norm": (RMSNorm,)}

BLOCK = "model.layers.{layer}."

# The tensors of every model that descends from Llama, but for those of the feed-forward.
TABLE: tuple[Row, ...] = (
    Row("model.embed_tokens.weight", "embed/embedding"),
    Row("model.norm.weight", "final_norm/scale"),
    *linear("lm_head", "head/unembed"),
    Row(f"{BLOCK}input_layernorm.weight", "mixer_norm/scale"),
    *linear(f"{BLOCK}self_attn.q_proj", "mixer/query"),
    *linear(f"{BLOCK}self_attn.k_proj", "mixer/key"),
    *linear(f"{BLOCK}self_attn.v_proj", "mixer/value"),
    *linear(f"{BLOCK}self_attn.o_proj", "mixer/out"),
    Row(f"{BLOCK}self_attn.q_norm.weight", "mixer/query_norm/scale"),
    Row(f"{BLOCK}self_attn.k_norm.weight", "mixer/key_norm/scale"),
    Row(f"{BLOCK}post_attention_layernorm.weight", "ffn_norm/scale"),
)

FEED_FORWARD: tuple[Row, ...] = (
    *linear(f"{BLOCK}mlp.gate_proj", "ffn/gate"),
    *linear(f"{BLOCK}mlp.up_proj", "ffn/up"),
    *linear(f"{BLOCK}mlp.down_proj", "ffn/down"),
)

# Some write a tied head once more; old checkpoints hold the rotary frequencies.
UNUSED = (
    "lm_head.weight",
    "model.layers.*.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
)


def read_activation(entries: Entries, name: str = "hidden_act", default: str = "silu") -> str:
    """Our name of the nonlinearity that an entry names; `default` is theirs of one that it leaves out."""
    return ACTIVATIONS[entries.only(name, default, *ACTIVATIONS)]


def write_activation(activation: str) -> str:
    """Their name of a nonlinearity; one that they lack keeps ours, and is refused when it is read again."""
    return next((name for name, ours in ACTIVATIONS.items() if ours == activation), activation)


def read_norm(entries: Entries, epsilon: float, **fields: Any) -> RMSNorm:
    """The norm of a config; with this epsilon if it does not say."""
    return RMSNorm(epsilon=entries.get("rms_norm_eps", float, epsilon), **fields)


def read_attention(entries: Entries, head_dim: int | None = None, **fields: Any) -> Attention:
    """Attention with the heads of a config.

    Args:
      entries: the config.
      head_dim: if the config does not say; None means hidden_size / num_attention_heads.
      **fields: further fields of `Attention`.
    """
    num_heads = entries.size("num_attention_heads")
    return Attention(
        num_heads=num_heads,
        num_kv_heads=entries.get("num_key_value_heads", int | None, None) or num_heads,
        head_dim=entries.get("head_dim", int | None, head_dim),
        **fields,
    )


def read_decoder(
    entries: Entries, mixers: tuple[nn.Module, ...], ffn: nn.Module, norm: nn.Module
) -> DecoderLM:
    """A decoder of these parts, with the widths of a config."""
    tied = entries.get("tie_word_embeddings", bool, False)
    return DecoderLM(
        vocab_size=entries.size("vocab_size"),
        d_model=entries.size("hidden_size"),
        num_layers=entries.size("num_hidden_layers"),
        mixers=mixers,
        ffn=ffn,
        head=Tied() if tied else Untied(),
        norm=norm,
        max_seq_len=entries.size("max_position_embeddings"),
    )


def write_decoder(model: SequenceModel, ffn: Gated | TopK) -> dict[str, Any]:
    """The entries of `read_attention` and `read_decoder`; `ffn` is that of the model."""
    attention = part_of(model.mixers[0], Attention)
    return {
        "head_dim": attention.head_dim,
        "hidden_act": write_activation(ffn.activation),
        "hidden_size": model.d_model,
        "max_position_embeddings": model.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": attention.num_kv_heads,
        "rms_norm_eps": model.norm.epsilon,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "vocab_size": model.vocab_size,
        **write_rope(attention),
    }
