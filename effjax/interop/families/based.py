"""BASED as Hazy Research publishes it: a GPT of theirs in which each layer's mixer is one of up to three.

The layout is that of the authors' `GPTLMHeadModel` (github.com/HazyResearch/based). They publish `pytorch_model.bin`,
which is pickle. What is read here is a folder with their `config.json` and the same tensors as safetensors, written so:

    tensors = torch.load("pytorch_model.bin", map_location="cpu", weights_only=True)
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, "model.safetensors")

The prefix "model." of their trainer and its counters may stay, or go as in the authors' own loading. What their classes
accept and do not use (`kernel_sizes` instead of `kernel_size`, a fixed decay) is without effect here as it is there.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from effjax.depth import Plain
from effjax.ffn import Gated
from effjax.heads import Tied, Untied
from effjax.interop.architecture import Architecture, part_of
from effjax.interop.entries import Entries
from effjax.interop.error import InteropError
from effjax.interop.families.windows import pattern
from effjax.interop.table import Row, linear, norm
from effjax.mixers import Attention, ShortConv, SlidingWindow, TaylorLinear
from effjax.models import DecoderLM, SequenceModel
from effjax.nn import LayerNorm, RMSNorm, TokenEmbedding

# A layer has the mixer of the last of these that lists it; the first lists none, and has all others.
_SLOTS = {
    "mixer": None,
    "alt_mixer": "alt_mixer_layers",
    "alt_mixer_2": "alt_mixer_2_layers",
}

_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_exact", "glu": "sigmoid"}

# The authors' feed-forwards round their width up to a multiple of this.
_WIDTH_MULTIPLE = 256

_MIXERS = "based.models.mixers"

# What a model has no use for if none of its mixers is attention.
_ATTENTION = (
    "n_head", "n_head_kv", "out_proj_bias", "qkv_proj_bias", "rotary_emb_base", "rotary_emb_fraction",
    "rotary_emb_interleaved", "rotary_emb_scale_base", "scale_attn_by_inverse_layer_idx", "scale_attn_weights",
)  # fmt: skip

# How they train and compute, and what their classes take and do not read.
_NO_EFFECT = (
    "_recursive_", "_target_", "checkpoint_mlp", "decay_const", "decay_denom", "ff_mult", "fixed_decay",
    "fused_bias_fc", "fused_dense_sqrelu_dense", "fused_dropout_add_ln", "fused_mlp", "mlp_checkpoint_lvl", "n_ctx",
    "reorder_and_upcast_attn", "sequence_parallel", "special_initializer", "use_flash_attn", "use_weight_init",
)  # fmt: skip

_BLOCK = "transformer.layers.{layer}."


def _mixer_rows() -> tuple[Row, ...]:
    rows: tuple[Row, ...] = ()
    for part in ("value", "gate"):
        rows += linear(f"{_BLOCK}mixer.in_proj", f"mixer/{part}", 0, ShortConv)
    # [channels, 1, taps] there and [taps, channels] here.
    conv = f"{_BLOCK}mixer.conv.conv"
    rows += (Row(f"{conv}.weight", "mixer/conv", (2, 0), mixer=ShortConv),)
    rows += (Row(f"{conv}.bias", "mixer/conv_bias", mixer=ShortConv),)
    for part, theirs in (("query", "proj_q"), ("key", "proj_k"), ("value", "proj_v")):
        rows += linear(f"{_BLOCK}mixer.{theirs}", f"mixer/{part}", mixer=TaylorLinear)
        rows += linear(f"{_BLOCK}mixer.Wqkv", f"mixer/{part}", 0, Attention)
    return rows + linear(f"{_BLOCK}mixer.out_proj", "mixer/out")


_TABLE = (
    Row("transformer.embeddings.word_embeddings.weight", "embed/embedding"),
    Row("transformer.embeddings.position_embeddings.weight", "embed/position"),
    *norm("transformer.ln_f", "final_norm"),
    *linear("lm_head", "head/unembed"),
    *norm(f"{_BLOCK}norm1", "mixer_norm"),
    *_mixer_rows(),
    *norm(f"{_BLOCK}norm2", "ffn_norm"),
    *linear(f"{_BLOCK}mlp.fc1", "ffn/up", joined=0),
    *linear(f"{_BLOCK}mlp.fc1", "ffn/gate", joined=0),
    *linear(f"{_BLOCK}mlp.fc2", "ffn/down"),
)


def _read(entries: Entries) -> DecoderLM:
    entries.ignore(*_NO_EFFECT, *_ATTENTION)
    for name, only in (("parallel_block", False), ("lm_head_bias", False), ("mlp_type", "base")):
        entries.only(name, only)
    entries.only("word_embed_proj_dim", None)
    mixers = _read_mixers(entries)
    # Their default is GPT-2's: `max_position_embeddings` is another name of it, and 0 means no learned positions.
    num_positions = entries.get("n_positions", int, 1024)
    num_positions = entries.get("max_position_embeddings", int, num_positions)
    multiple = entries.size("pad_vocab_size_multiple", 1)
    epsilon = entries.get("layer_norm_epsilon", float, 1e-5)
    is_rms = entries.get("rms_norm", bool, False)
    tied = entries.get("tie_word_embeddings", bool, True)
    return DecoderLM(
        vocab_size=_rounded_up(entries.size("vocab_size"), multiple),
        d_model=entries.size("n_embd"),
        num_layers=entries.size("n_layer"),
        mixers=mixers,
        ffn=_read_feed_forward(entries),
        head=Tied() if tied else Untied(),
        norm=RMSNorm(epsilon) if is_rms else LayerNorm(epsilon),
        norm_order="pre" if entries.get("prenorm", bool, True) else "post",
        embed=TokenEmbedding(learned_positions=num_positions > 0),
        max_seq_len=num_positions or _read_longest(entries),
    )


def _read_longest(entries: Entries) -> int:
    """The longest sequence that a mixer is for; nothing but learned positions depends on it."""
    slots = [entries.get(slot, dict | None, None) for slot in _SLOTS]
    return max(Entries(slot, entries.where).size("l_max", 2048) for slot in slots if slot)


def _read_feed_forward(entries: Entries) -> Gated:
    entries.get("activation_function", str)  # theirs without it is another kind of feed-forward
    activation = entries.only("activation_function", *_ACTIVATIONS)
    biases = {entries.get(name, bool, True) for name in ("mlp_fc1_bias", "mlp_fc2_bias")}
    if len(biases) > 1:
        raise InteropError(f"{entries.where}: mlp_fc1_bias and mlp_fc2_bias differ; valid: equal")
    width = entries.get("n_inner", int | None, None) or 8 * entries.size("n_embd") // 3
    return Gated(_rounded_up(width, _WIDTH_MULTIPLE), _ACTIVATIONS[activation], biases.pop())


def _read_mixers(entries: Entries) -> tuple[nn.Module, ...]:
    """The shortest pattern of mixers that the slots of the config make."""
    readers = {
        "BaseConv": _read_conv,
        "LinearAttention": _read_linear_attention,
        "SlidingAttention": lambda slot: _read_window(slot, entries),
    }
    num_layers = entries.size("n_layer")
    chosen: list[Any] = [None] * num_layers
    for slot, listing in _SLOTS.items():
        layers = range(num_layers) if listing is None else entries.get(listing, list, [])
        part = entries.get(slot, dict | None, None)
        if part is None and layers:
            raise InteropError(f"{entries.where}: {slot} is missing; valid: one of {[*readers]}")
        if part is None:
            continue
        within = Entries(part, f"{entries.where}: {slot}")
        name = within.get("_target_", str).rpartition(".")[2]
        if name not in readers:
            raise InteropError(f"{within.where}: _target_ is {name!r}; valid: one of {[*readers]}")
        for layer in layers:
            if layer not in range(num_layers):
                raise InteropError(
                    f"{entries.where}: {listing} has {layer!r}; valid: 0 to {num_layers - 1}"
                )
            chosen[layer] = readers[name](within)
    return pattern(chosen)


def _read_conv(slot: Entries) -> ShortConv:
    expansion = slot.size("expand_proj", 2)
    if expansion % 2:
        raise InteropError(f"{slot.where}: expand_proj={expansion} is not supported; valid: even")
    return ShortConv(
        width=slot.size("kernel_size", 3),
        expansion=expansion // 2,  # there the value and the gate together
        use_bias=slot.get("use_bias", bool, True),
        conv_bias=slot.get("use_cuda", bool, False),  # as their kernel has it
    )


def _read_linear_attention(slot: Entries) -> TaylorLinear:
    feature_dim = slot.size("feature_dim", 16)
    feature_map = Entries(slot.get("feature_map", dict), f"{slot.where}: feature_map")
    name = feature_map.get("_target_", str).rpartition(".")[2]
    if name != "TaylorExp":
        raise InteropError(f"{feature_map.where}: _target_ is {name!r}; valid: 'TaylorExp'")
    feature_map.only("input_dim", feature_dim)
    # Ways to compute the same; the one that is left out has a norm that the others lack.
    slot.only("parallel_implementation", "quadratic", "linear", "fla_parallel", "fla_chunk")
    return TaylorLinear(
        num_heads=slot.size("num_heads", 16),
        feature_dim=feature_dim,
        head_dim=slot.get("head_dim", int | None, None),
        eps=slot.get("eps", float, 1e-12),
    )


def _read_window(slot: Entries, entries: Entries) -> SlidingWindow:
    """Sliding attention, which has but its window from the slot and all else from the model."""
    for name in ("scale_attn_by_inverse_layer_idx", "rotary_emb_interleaved"):
        entries.only(name, False)
    entries.only("rotary_emb_scale_base", None)
    is_rotary = entries.only("rotary_emb_fraction", 0, 1)
    base = entries.get("rotary_emb_base", float, 10_000.0)
    return SlidingWindow(
        num_heads=entries.size("n_head"),
        num_kv_heads=entries.get("n_head_kv", int | None, None),
        # They count the keys to both sides, and attend to those on one.
        window=slot.size("window_size", 128) // 2 + 1,
        qkv_bias=entries.get("qkv_proj_bias", bool, True),
        out_bias=entries.get("out_proj_bias", bool, True),
        rope_base=base if is_rotary else None,
        logits_scale=None if entries.get("scale_attn_weights", bool, True) else 1.0,
    )


def _write(model: SequenceModel) -> dict[str, Any]:
    ffn = part_of(model.ffn, Gated)
    return {
        "activation_function": _their_activation(ffn.activation),
        "layer_norm_epsilon": model.norm.epsilon,
        "mlp_fc1_bias": ffn.use_bias,
        "mlp_fc2_bias": ffn.use_bias,
        "n_embd": model.d_model,
        "n_inner": ffn.hidden_dim,
        "n_layer": model.num_layers,
        "n_positions": model.max_seq_len if model.embed.learned_positions else 0,
        "prenorm": model.norm_order == "pre",
        "rms_norm": isinstance(model.norm, RMSNorm),
        "tie_word_embeddings": isinstance(model.head, Tied),
        "vocab_size": model.vocab_size,
        **_write_attention(model),
        **_write_mixers(model),
    }


def _their_activation(activation: str) -> str:
    return next((name for name, ours in _ACTIVATIONS.items() if ours == activation), activation)


def _write_attention(model: SequenceModel) -> dict[str, Any]:
    attention = next((m for m in model.mixers if isinstance(m, Attention)), Attention(1))
    return {
        "n_head": attention.num_heads,
        "n_head_kv": attention.num_kv_heads,
        "out_proj_bias": attention.out_bias,
        "qkv_proj_bias": attention.qkv_bias,
        "rotary_emb_base": attention.rope_base or 10_000.0,
        "rotary_emb_fraction": 0 if attention.rope_base is None else 1,
        "scale_attn_by_inverse_layer_idx": False,  # their configs say so, as GPT-2's once was another
        "scale_attn_weights": attention.logits_scale != 1.0,
    }


def _write_mixers(model: SequenceModel) -> dict[str, Any]:
    """The slots; a fourth kind of mixer gets none, which is found when the config is read again."""
    written: dict[str, Any] = {}
    kinds = list(dict.fromkeys(model.mixers))
    for (slot, listing), mixer in zip(_SLOTS.items(), kinds, strict=False):
        written[slot] = {**_write_mixer(mixer, model.max_seq_len), "l_max": model.max_seq_len}
        if listing is not None:
            written[listing] = [i for i, m in enumerate(model.mixers) if m == mixer]
    return written


def _write_mixer(mixer: nn.Module, longest: int) -> Mapping[str, Any]:
    if isinstance(mixer, ShortConv):
        return {
            "_target_": f"{_MIXERS}.convolution.BaseConv",
            "expand_proj": 2 * mixer.expansion,
            "kernel_size": mixer.width,
            "use_bias": mixer.use_bias,
            "use_cuda": mixer.conv_bias,
        }
    if isinstance(mixer, TaylorLinear):
        taylor = f"{_MIXERS}.linear_attention.TaylorExp"
        return {
            "_target_": f"{_MIXERS}.linear_attention.LinearAttention",
            "eps": mixer.eps,
            "feature_dim": mixer.feature_dim,
            "feature_map": {"_target_": taylor, "input_dim": mixer.feature_dim},
            "head_dim": mixer.head_dim,
            "num_heads": mixer.num_heads,
        }
    return {
        "_target_": f"{_MIXERS}.slide_attention.SlidingAttention",
        "num_heads": mixer.num_heads,
        # Attention without a window is written with one over everything, and refused when it is read again.
        "window_size": max(1, 2 * ((mixer.window or longest) - 1)),
    }


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


ARCHITECTURES = (
    Architecture(
        "GPTLMHeadModel",
        "gpt2",
        table=_TABLE,
        read=_read,
        write=_write,
        parts={
            "mixers": (ShortConv, TaylorLinear, Attention),
            "ffn": (Gated,),
            "depth": (Plain,),
            "head": (Tied, Untied),
            "norm": (RMSNorm, LayerNorm),
            "embed": (TokenEmbedding,),
        },
        # Counters of their trainer, and what their code computes anew.
        unused=("lm_head.weight", "*metrics*", "*.rotary_emb.inv_freq", "transformer.decay.decay"),
        renamed=((r"^model\.", ""),),
        known_by="alt_mixer",
    ),
)
