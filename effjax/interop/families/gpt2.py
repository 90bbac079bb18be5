"""GPT-2: learned positions, LayerNorm, biases everywhere."""

from typing import Any

from effjax.depth import Plain
from effjax.ffn import Dense
from effjax.heads import Tied, Untied
from effjax.interop.architecture import Architecture, part_of
from effjax.interop.entries import Entries
from effjax.interop.families.decoder import read_activation, write_activation
from effjax.interop.table import Row, linear, norm
from effjax.mixers import Attention
from effjax.models import DecoderLM, SequenceModel
from effjax.nn import LayerNorm, TokenEmbedding

_BLOCK = "transformer.h.{layer}."


def _conv1d(theirs: str, *ours: str) -> tuple[Row, ...]:
    """Its linear layers, whose weight is [in, out] as ours are; one there may be several here, side by side."""
    axes = (1, 0) if len(ours) > 1 else (None, None)
    return tuple(
        row
        for path in ours
        for row in (
            Row(f"{_BLOCK}{theirs}.weight", f"{path}/kernel", joined=axes[0]),
            Row(f"{_BLOCK}{theirs}.bias", f"{path}/bias", joined=axes[1]),
        )
    )


_TABLE = (
    Row("transformer.wte.weight", "embed/embedding"),
    Row("transformer.wpe.weight", "embed/position"),
    *norm("transformer.ln_f", "final_norm"),
    *linear("lm_head", "head/unembed"),
    *norm(f"{_BLOCK}ln_1", "mixer_norm"),
    *_conv1d("attn.c_attn", "mixer/query", "mixer/key", "mixer/value"),
    *_conv1d("attn.c_proj", "mixer/out"),
    *norm(f"{_BLOCK}ln_2", "ffn_norm"),
    *_conv1d("mlp.c_fc", "ffn/up"),
    *_conv1d("mlp.c_proj", "ffn/down"),
)


def _read(entries: Entries) -> DecoderLM:
    entries.only("scale_attn_weights", True)
    entries.only("scale_attn_by_inverse_layer_idx", False)
    for name in ("n_ctx", "reorder_and_upcast_attn"):  # the first says again, the other says how
        entries.get(name, int | bool | None, None)
    width = entries.size("n_embd")
    tied = entries.get("tie_word_embeddings", bool, True)
    return DecoderLM(
        vocab_size=entries.size("vocab_size"),
        d_model=width,
        num_layers=entries.size("n_layer"),
        mixers=(Attention(entries.size("n_head"), qkv_bias=True, out_bias=True, rope_base=None),),
        ffn=Dense(
            hidden_dim=entries.get("n_inner", int | None, None) or 4 * width,
            activation=read_activation(entries, "activation_function", "gelu_new"),
            use_bias=True,
        ),
        head=Tied() if tied else Untied(),
        norm=LayerNorm(epsilon=entries.get("layer_norm_epsilon", float, 1e-5)),
        embed=TokenEmbedding(learned_positions=True),
        max_seq_len=entries.size("n_positions"),
    )


def _write(model: SequenceModel) -> dict[str, Any]:
    ffn = part_of(model.ffn, Dense)
    return {
        "activation_function": write_activation(ffn.activation),
        "layer_norm_epsilon": model.norm.epsilon,
        "n_embd": model.d_model,
        "n_head": model.mixers[0].num_heads,
        "n_inner": ffn.hidden_dim,
        "n_layer": model.num_layers,
        "n_positions": model.max_seq_len,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "vocab_size": model.vocab_size,
    }


ARCHITECTURES = (
    Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        table=_TABLE,
        read=_read,
        write=_write,
        parts={
            "mixers": (Attention,),
            "ffn": (Dense,),
            "depth": (Plain,),
            "head": (Tied, Untied),
            "norm": (LayerNorm,),
            "embed": (TokenEmbedding,),
        },
        unused=("lm_head.weight", "*.attn.bias", "*.attn.masked_bias"),  # masks, in old checkpoints
        renamed=((r"^(?=wte\.|wpe\.|ln_f\.|h\.)", "transformer."),),
    ),
)
