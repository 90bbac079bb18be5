"""Llama and the dense models that descend from it: Llama 1 to 3 and SmolLM, Mistral, Qwen 1.5 to 2.5, Qwen 3.

All are `transformer`: RMSNorm, rotary grouped-query attention, SwiGLU. They differ in biases, windows and the norm of
queries and keys.
"""

import functools
from typing import Any

from effjax.ffn import Gated
from effjax.interop.architecture import Architecture, part_of
from effjax.interop.entries import Entries
from effjax.interop.families.decoder import (
    FEED_FORWARD,
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
from effjax.models import DecoderLM, SequenceModel


def _feed_forward(entries: Entries, use_bias: bool = False) -> Gated:
    width, activation = entries.size("intermediate_size"), read_activation(entries)
    return Gated(hidden_dim=width, activation=activation, use_bias=use_bias)


def _write(model: SequenceModel) -> dict[str, Any]:
    ffn = part_of(model.ffn, Gated)
    return {**write_decoder(model, ffn), "intermediate_size": ffn.hidden_dim}


def read_llama(entries: Entries) -> DecoderLM:
    """The model of a Llama's config."""
    bias = entries.get("attention_bias", bool, False)
    attention = read_attention(entries, **read_rope(entries), qkv_bias=bias, out_bias=bias)
    ffn = _feed_forward(entries, entries.get("mlp_bias", bool, False))
    return read_decoder(entries, (attention,), ffn, read_norm(entries, 1e-6))


def write_llama(model: SequenceModel) -> dict[str, Any]:
    """The entries of `read_llama`."""
    return {
        **_write(model),
        "attention_bias": model.mixers[0].qkv_bias,
        "mlp_bias": part_of(model.ffn, Gated).use_bias,
    }


def _read_mistral(entries: Entries) -> DecoderLM:
    window = entries.get("sliding_window", int | None, 4096)
    attention = read_attention(entries, **read_rope(entries), window=window)
    return read_decoder(entries, (attention,), _feed_forward(entries), read_norm(entries, 1e-6))


def _write_mistral(model: SequenceModel) -> dict[str, Any]:
    return {**_write(model), "sliding_window": model.mixers[0].window}


def _read_qwen2(entries: Entries) -> DecoderLM:
    attention = read_attention(entries, **read_rope(entries), qkv_bias=True)
    mixers = pattern([attention.clone(window=w) for w in read_qwen_windows(entries)])
    return read_decoder(entries, mixers, _feed_forward(entries), read_norm(entries, 1e-6))


def _write_qwen2(model: SequenceModel) -> dict[str, Any]:
    return {**_write(model), **write_qwen_windows(model)}


def _read_qwen3(entries: Entries) -> DecoderLM:
    bias = entries.get("attention_bias", bool, False)
    attention = read_attention(
        entries,
        head_dim=128,
        **read_rope(entries),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        norm=read_norm(entries, 1e-6),
    )
    mixers = pattern([attention.clone(window=w) for w in read_qwen_windows(entries)])
    return read_decoder(entries, mixers, _feed_forward(entries), read_norm(entries, 1e-6))


def _write_qwen3(model: SequenceModel) -> dict[str, Any]:
    return {**_write_qwen2(model), "attention_bias": model.mixers[0].qkv_bias}


_architecture = functools.partial(
    Architecture,
    table=(*TABLE, *FEED_FORWARD),
    parts={**PARTS, "ffn": (Gated,)},
    unused=UNUSED,
)

ARCHITECTURES = (
    _architecture("LlamaForCausalLM", "llama", read=read_llama, write=write_llama),
    _architecture("MistralForCausalLM", "mistral", read=_read_mistral, write=_write_mistral),
    _architecture("Qwen2ForCausalLM", "qwen2", read=_read_qwen2, write=_write_qwen2),
    _architecture("Qwen3ForCausalLM", "qwen3", read=_read_qwen3, write=_write_qwen3),
)
