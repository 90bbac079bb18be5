"""Mixtures of experts in the shape of Llama: Mixtral, OLMoE, Qwen 1.5 and 2 MoE, Qwen 3 MoE.

They differ from the dense models in the feed-forward alone, `TopK` without dropping, and among each other in whether
the weights of the chosen experts are renormalised and in what every token passes beside them.
"""

import functools
from typing import Any

from effjax.ffn import TopK
from effjax.interop.architecture import Architecture, part_of
from effjax.interop.entries import Entries
from effjax.interop.families.decoder import (
    BLOCK,
    PARTS,
    TABLE,
    UNUSED,
    read_activation,
    read_attention,
    read_decoder,
    read_norm,
    write_decoder,
)
from effjax.interop.families.rope import read_rope
from effjax.interop.families.windows import pattern, read_qwen_windows, write_qwen_windows
from effjax.interop.table import Row, linear
from effjax.models import DecoderLM, SequenceModel


def _experts(gate: str, up: str, down: str) -> tuple[Row, ...]:
    names = {"gate": gate, "up": up, "down": down}
    return tuple(
        Row(f"{BLOCK}{name}.weight", f"ffn/experts/{ours}", axes=(1, 0))
        for ours, name in names.items()
    )


_MIXTRAL = (
    *TABLE,
    *linear(f"{BLOCK}block_sparse_moe.gate", "ffn/router"),
    *_experts(*(f"block_sparse_moe.experts.{{expert}}.{name}" for name in ("w1", "w3", "w2"))),
)

_OTHERS = (
    *TABLE,
    *linear(f"{BLOCK}mlp.gate", "ffn/router"),
    *_experts(*(f"mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down"))),
    *linear(f"{BLOCK}mlp.shared_expert.gate_proj", "ffn/shared/gate"),
    *linear(f"{BLOCK}mlp.shared_expert.up_proj", "ffn/shared/up"),
    *linear(f"{BLOCK}mlp.shared_expert.down_proj", "ffn/shared/down"),
    *linear(f"{BLOCK}mlp.shared_expert_gate", "ffn/shared_gate"),
)


def _mixture(entries: Entries, width: str, aux_weight: float, **fields: Any) -> TopK:
    """The mixture of a config, which has the width of its experts under that name."""
    # One name for their number, or the other, depending on the version of transformers too.
    num_experts = entries.get("num_experts", int | None, None)
    return TopK(
        num_experts=num_experts or entries.size("num_local_experts"),
        hidden_dim=entries.size(width),
        top_k=entries.size("num_experts_per_tok"),
        activation=read_activation(entries),
        dispatch="dropless",
        balance_weight=entries.get("router_aux_loss_coef", float, aux_weight),
        z_weight=0.0,
        **fields,
    )


def _write(model: SequenceModel, width: str) -> dict[str, Any]:
    ffn = part_of(model.ffn, TopK)
    return {
        **write_decoder(model, ffn),
        width: ffn.hidden_dim,
        "num_experts": ffn.num_experts,
        "num_experts_per_tok": ffn.top_k,
        "router_aux_loss_coef": ffn.balance_weight,
    }


def _read_mixtral(entries: Entries) -> DecoderLM:
    attention = read_attention(
        entries,
        **read_rope(entries, theta=1e6),
        window=entries.get("sliding_window", int | None, None),
    )
    ffn = _mixture(entries, "intermediate_size", 0.001)
    return read_decoder(entries, (attention,), ffn, read_norm(entries, 1e-5))


def _write_mixtral(model: SequenceModel) -> dict[str, Any]:
    written = _write(model, "intermediate_size")
    written["num_local_experts"] = written.pop("num_experts")
    return {**written, "sliding_window": model.mixers[0].window}


def _read_olmoe(entries: Entries) -> DecoderLM:
    entries.only("clip_qkv", None)
    bias = entries.get("attention_bias", bool, False)
    attention = read_attention(
        entries,
        **read_rope(entries),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        qk_norm_over="heads",
        norm=read_norm(entries, 1e-5),
    )
    renormalise = entries.get("norm_topk_prob", bool, False)
    ffn = _mixture(entries, "intermediate_size", 0.01, renormalise=renormalise)
    return read_decoder(entries, (attention,), ffn, read_norm(entries, 1e-5))


def _write_olmoe(model: SequenceModel) -> dict[str, Any]:
    return {
        **_write(model, "intermediate_size"),
        "attention_bias": model.mixers[0].qkv_bias,
        "norm_topk_prob": part_of(model.ffn, TopK).renormalise,
    }


def _sparse_everywhere(entries: Entries) -> None:
    """Qwen's mixtures may have dense layers among them, of this width; ours are the same in every layer."""
    entries.only("decoder_sparse_step", 1)
    entries.only("mlp_only_layers", [], None)
    entries.get("intermediate_size", int | None, None)


def _read_qwen2_moe(entries: Entries) -> DecoderLM:
    _sparse_everywhere(entries)
    bias = entries.get("qkv_bias", bool, True)
    attention = read_attention(entries, **read_rope(entries), qkv_bias=bias)
    ffn = _mixture(
        entries,
        "moe_intermediate_size",
        0.001,
        renormalise=entries.get("norm_topk_prob", bool, False),
        shared_hidden_dim=entries.size("shared_expert_intermediate_size"),
        gate_shared=True,
    )
    mixers = pattern([attention.clone(window=w) for w in read_qwen_windows(entries)])
    return read_decoder(entries, mixers, ffn, read_norm(entries, 1e-6))


def _write_qwen2_moe(model: SequenceModel) -> dict[str, Any]:
    return {
        **_write(model, "moe_intermediate_size"),
        **write_qwen_windows(model),
        "norm_topk_prob": part_of(model.ffn, TopK).renormalise,
        "qkv_bias": model.mixers[0].qkv_bias,
        "shared_expert_intermediate_size": part_of(model.ffn, TopK).shared_hidden_dim,
    }


def _read_qwen3_moe(entries: Entries) -> DecoderLM:
    _sparse_everywhere(entries)
    # Versions of transformers disagree on which layers would have the window.
    entries.only("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):
        entries.get(name, int | None, None)
    bias = entries.get("attention_bias", bool, False)
    attention = read_attention(
        entries,
        **read_rope(entries),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        norm=read_norm(entries, 1e-6),
    )
    renormalise = entries.get("norm_topk_prob", bool, False)
    ffn = _mixture(entries, "moe_intermediate_size", 0.001, renormalise=renormalise)
    return read_decoder(entries, (attention,), ffn, read_norm(entries, 1e-6))


def _write_qwen3_moe(model: SequenceModel) -> dict[str, Any]:
    return {
        **_write(model, "moe_intermediate_size"),
        "attention_bias": model.mixers[0].qkv_bias,
        "norm_topk_prob": part_of(model.ffn, TopK).renormalise,
    }


_architecture = functools.partial(Architecture, parts={**PARTS, "ffn": (TopK,)}, unused=UNUSED)

ARCHITECTURES = (
    _architecture(
        "MixtralForCausalLM",
        "mixtral",
        table=_MIXTRAL,
        read=_read_mixtral,
        write=_write_mixtral,
    ),
    _architecture(
        "OlmoeForCausalLM",
        "olmoe",
        table=_OTHERS,
        read=_read_olmoe,
        write=_write_olmoe,
    ),
    _architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        table=_OTHERS,
        read=_read_qwen3_moe,
        write=_write_qwen3_moe,
    ),
    _architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        table=_OTHERS,
        read=_read_qwen2_moe,
        write=_write_qwen2_moe,
    ),
)
