"""Gemma 1, 2 and 3 (text): scaled embeddings, zero-centred norms, GeGLU.

Gemma 2 and 3 have a second norm behind mixer and feed-forward, and windows in most layers. Gemma 2 caps logits; Gemma 3
normalises queries and keys instead, and its windows have rotary frequencies of their own.
"""

import functools
from typing import Any

from effjax.ffn import Gated
from effjax.heads import Tied, Untied
from effjax.interop.architecture import Architecture, part_of
from effjax.interop.entries import Entries
from effjax.interop.families.decoder import (
    BLOCK,
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
from effjax.interop.families.rope import read_rope, write_rope
from effjax.interop.families.windows import (
    FULL,
    SLIDING,
    pattern,
    read_layer_types,
    write_layer_types,
)
from effjax.interop.table import Row
from effjax.mixers import Attention
from effjax.models import DecoderLM, SequenceModel
from effjax.nn import TokenEmbedding

_SANDWICH = {
    f"{BLOCK}post_attention_layernorm.weight": "mixer_out_norm/scale",
    f"{BLOCK}pre_feedforward_layernorm.weight": "ffn_norm/scale",
    f"{BLOCK}post_feedforward_layernorm.weight": "ffn_out_norm/scale",
}

_GEMMA = (*TABLE, *FEED_FORWARD)
_GEMMA2 = (
    *(row for row in _GEMMA if row.theirs not in _SANDWICH),
    *(Row(theirs, ours) for theirs, ours in _SANDWICH.items()),
)


def _attention(entries: Entries, **fields: Any) -> Attention:
    bias = entries.get("attention_bias", bool, False)
    return read_attention(entries, head_dim=256, qkv_bias=bias, out_bias=bias, **fields)


def _decoder(
    entries: Entries, mixers: list[Attention], norm_order: str, soft_cap: float | None = None
) -> DecoderLM:
    """A decoder with these mixers; `soft_cap` is of the logits if the config does not say."""
    entries.only("use_bidirectional_attention", False, None)
    ffn = Gated(hidden_dim=entries.size("intermediate_size"), activation=_activation(entries))
    norm = read_norm(entries, 1e-6, zero_centred=True)
    head = Tied if entries.get("tie_word_embeddings", bool, True) else Untied
    cap = entries.get("final_logit_softcapping", float | None, soft_cap)
    return read_decoder(entries, pattern(mixers), ffn, norm).clone(
        head=head(soft_cap=cap), norm_order=norm_order, embed=TokenEmbedding(scale_by_width=True)
    )


def _activation(entries: Entries) -> str:
    """The nonlinearity of either entry; the first configs said "gelu" and meant its tanh form."""
    is_new = entries.get("hidden_activation", str | None, None) is not None
    old = read_activation(entries, "hidden_act", "gelu_pytorch_tanh")
    found = read_activation(entries, "hidden_activation") if is_new else old
    return "gelu" if found == "gelu_exact" else found


def _windowed(
    entries: Entries, types: list[str], full: Attention, sliding: Attention
) -> list[Attention]:
    """The mixer of each layer."""
    sliding = sliding.clone(window=entries.get("sliding_window", int | None, 4096))
    return [sliding if kind == SLIDING else full for kind in types]


def _write(model: SequenceModel) -> dict[str, Any]:
    ffn = part_of(model.ffn, Gated)
    written = write_decoder(model, ffn)
    return {
        **written,
        "attention_bias": model.mixers[0].qkv_bias,
        "hidden_activation": written["hidden_act"],
        "intermediate_size": ffn.hidden_dim,
    }


def _write_windowed(model: SequenceModel) -> dict[str, Any]:
    windows = [mixer.window for mixer in model.mixers if mixer.window is not None]
    return {
        **_write(model),
        **write_layer_types(model),
        "attn_logit_softcapping": model.mixers[0].logits_soft_cap,
        "final_logit_softcapping": model.head.soft_cap,
        # The number that was read, and not what its root, rounded, squares to.
        "query_pre_attn_scalar": round(model.mixers[0].logits_scale ** -2),
        "sliding_window": windows[0] if windows else None,
    }


def _scale(entries: Entries) -> float:
    return entries.get("query_pre_attn_scalar", float, 256.0) ** -0.5


def _read_gemma(entries: Entries) -> DecoderLM:
    return _decoder(entries, [_attention(entries, **read_rope(entries))] * _layers(entries), "pre")


def _layers(entries: Entries) -> int:
    return entries.size("num_hidden_layers")


def _read_gemma2(entries: Entries) -> DecoderLM:
    attention = _attention(
        entries,
        **read_rope(entries),
        logits_scale=_scale(entries),
        logits_soft_cap=entries.get("attn_logit_softcapping", float | None, 50.0),
    )
    older = [(SLIDING, FULL)[i % 2] for i in range(_layers(entries))]
    mixers = _windowed(entries, read_layer_types(entries, older), attention, attention)
    return _decoder(entries, mixers, "sandwich", soft_cap=30.0)


def _read_gemma3(entries: Entries) -> DecoderLM:
    attention = _attention(
        entries,
        qk_norm=True,
        norm=read_norm(entries, 1e-6, zero_centred=True),
        logits_scale=_scale(entries),
        logits_soft_cap=entries.get("attn_logit_softcapping", float | None, None),
    )
    period = entries.size("_sliding_window_pattern", 6)
    period = entries.size("sliding_window_pattern", period)
    older = [SLIDING if (i + 1) % period else FULL for i in range(_layers(entries))]
    far, near = (attention.clone(**rope) for rope in _ropes(entries))
    mixers = _windowed(entries, read_layer_types(entries, older), far, near)
    return _decoder(entries, mixers, "sandwich")


def _ropes(entries: Entries) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary fields of the layers that see everything, and of the others."""
    nested = entries.get("rope_parameters", dict | None, None) or {}
    if FULL not in nested:
        local = {"rope_base": entries.get("rope_local_base_freq", float, 10_000.0)}
        return read_rope(entries, theta=1e6), local
    far, near = (
        Entries({"rope_parameters": nested[kind]}, f"{entries.where}: {kind}")
        for kind in (FULL, SLIDING)
    )
    return read_rope(far, theta=1e6), read_rope(near)


def _write_gemma3(model: SequenceModel) -> dict[str, Any]:
    far = next((m for m in model.mixers if m.window is None), model.mixers[0])
    near = next((m for m in model.mixers if m.window is not None), model.mixers[0])
    types = write_layer_types(model)["layer_types"]
    return {
        **_write_windowed(model),
        **write_rope(part_of(far, Attention)),
        "rope_local_base_freq": near.rope_base,
        # For versions of transformers that know no `layer_types`.
        "sliding_window_pattern": types.index(FULL) + 1 if FULL in types else len(types) + 1,
    }


_architecture = functools.partial(
    Architecture,
    parts={**PARTS, "ffn": (Gated,), "embed": (TokenEmbedding,)},
    unused=UNUSED,
)

ARCHITECTURES = (
    _architecture("GemmaForCausalLM", "gemma", table=_GEMMA, read=_read_gemma, write=_write),
    _architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        table=_GEMMA2,
        read=_read_gemma2,
        write=_write_windowed,
    ),
    _architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        table=_GEMMA2,
        read=_read_gemma3,
        write=_write_gemma3,
    ),
)
