"""Mamba and Mamba-2 as transformers has them: layers that are one recurrence each, without feed-forwards."""

import math
from typing import Any

import flax.linen as nn

from effjax.depth import Plain
from effjax.heads import Tied, Untied
from effjax.interop.architecture import Architecture
from effjax.interop.entries import Entries
from effjax.interop.error import InteropError
from effjax.interop.table import Row, linear
from effjax.mixers import Mamba, Mamba2
from effjax.models import DecoderLM, SequenceModel
from effjax.nn import RMSNorm

# Nothing in these models knows of a longest sequence, and most configs name none.
_MAX_SEQ_LEN = 2**20

_MIXER = "backbone.layers.{layer}.mixer."

_TABLE = (
    Row("backbone.embeddings.weight", "embed/embedding"),
    Row("backbone.norm_f.weight", "final_norm/scale"),
    *linear("lm_head", "head/unembed"),
    Row("backbone.layers.{layer}.norm.weight", "mixer_norm/scale"),
    Row(f"{_MIXER}A_log", "mixer/A_log"),
    Row(f"{_MIXER}D", "mixer/D"),
    # [channels, 1, taps] there and [taps, channels] here.
    Row(f"{_MIXER}conv1d.weight", "mixer/conv", axes=(2, 0)),
    Row(f"{_MIXER}conv1d.bias", "mixer/conv_bias"),
    *linear(f"{_MIXER}out_proj", "mixer/out"),
)


def _joined(name: str, parts: tuple[str, ...]) -> tuple[Row, ...]:
    """One linear layer there for several here."""
    return tuple(linear(f"{_MIXER}{name}", f"mixer/{part}", joined=0)[0] for part in parts)


_MAMBA = (
    *_TABLE,
    *_joined("in_proj", ("value", "gate")),
    *_joined("x_proj", ("step_down", "B", "C")),
    linear(f"{_MIXER}dt_proj", "mixer/step_up")[0],
    Row(f"{_MIXER}dt_proj.bias", "mixer/step_bias"),
)

_MAMBA2 = (
    *_TABLE,
    *_joined("in_proj", ("gate", "value", "B", "C", "step")),
    Row(f"{_MIXER}dt_bias", "mixer/step_bias"),
    Row(f"{_MIXER}norm.weight", "mixer/norm_scale"),
)


def _model(entries: Entries, mixer: nn.Module, tied: bool) -> DecoderLM:
    """Checks what both have in common; `tied` is what a config means that does not say."""
    entries.only("use_bias", False)
    entries.only("use_conv_bias", True)
    entries.only("hidden_act", "silu", "swish")
    entries.only("rms_norm", True)
    # Some configs say things twice, or hold options of the authors' code that transformers does not read.
    entries.only("d_model", entries.size("hidden_size"))
    entries.only("n_layer", entries.size("num_hidden_layers"))
    entries.only("ssm_cfg", {}, None)
    tied = entries.get("tie_word_embeddings", bool, tied)
    return DecoderLM(
        vocab_size=entries.size("vocab_size"),
        d_model=entries.size("hidden_size"),
        num_layers=entries.size("num_hidden_layers"),
        mixers=(mixer,),
        ffn=None,
        head=Tied() if tied else Untied(),
        norm=RMSNorm(epsilon=entries.get("layer_norm_epsilon", float, 1e-5)),
        max_seq_len=entries.size("max_position_embeddings", _MAX_SEQ_LEN),
    )


def _write(model: SequenceModel) -> dict[str, Any]:
    mixer = model.mixers[0]
    return {
        "conv_kernel": mixer.width,
        "expand": mixer.expansion,
        "hidden_act": "silu",
        "hidden_size": model.d_model,
        "layer_norm_epsilon": model.norm.epsilon,
        "max_position_embeddings": model.max_seq_len,
        "num_hidden_layers": model.num_layers,
        "state_size": mixer.state_dim,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "use_bias": False,
        "use_conv_bias": True,
        "vocab_size": model.vocab_size,
    }


def _read_mamba(entries: Entries) -> DecoderLM:
    width, expansion = entries.size("hidden_size"), entries.size("expand", 2)
    rank = entries.get("time_step_rank", int | str, "auto")
    for name in ("intermediate_size", "d_inner"):
        entries.only(name, expansion * width)
    mixer = Mamba(
        state_dim=entries.size("state_size", 16),
        expansion=expansion,
        width=entries.size("conv_kernel", 4),
        step_rank=math.ceil(width / 16) if rank == "auto" else rank,
    )
    return _model(entries, mixer, tied=True)


def _write_mamba(model: SequenceModel) -> dict[str, Any]:
    mixer = model.mixers[0]
    channels = mixer.expansion * model.d_model
    return {**_write(model), "intermediate_size": channels, "time_step_rank": mixer.step_rank}


def _read_mamba2(entries: Entries) -> DecoderLM:
    entries.get("norm_before_gate", bool, False)  # transformers has the gate before it either way
    limits = entries.get("time_step_limit", list, [0.0, math.inf])
    if limits != [0.0, math.inf]:
        raise InteropError(
            f"{entries.where}: time_step_limit={limits} is not supported; valid: [0.0, Infinity]"
        )
    width, expansion = entries.size("hidden_size"), entries.size("expand", 2)
    head_dim = entries.size("head_dim", 64)
    entries.get("time_step_rank", int | str, "auto")  # is written, but Mamba-2 has no such rank
    entries.only("num_heads", expansion * width // head_dim)
    mixer = Mamba2(
        head_dim=head_dim,
        state_dim=entries.size("state_size", 128),
        num_groups=entries.size("n_groups", 8),
        expansion=expansion,
        width=entries.size("conv_kernel", 4),
        norm_groups=1,
        epsilon=entries.get("layer_norm_epsilon", float, 1e-5),
    )
    return _model(entries, mixer, tied=False)


def _write_mamba2(model: SequenceModel) -> dict[str, Any]:
    mixer = model.mixers[0]
    heads, _ = mixer.dims(model.d_model)
    sizes = {"head_dim": mixer.head_dim, "n_groups": mixer.num_groups, "num_heads": heads}
    return {**_write(model), **sizes, "rms_norm": True}


_COMMON = {"depth": (Plain,), "head": (Tied, Untied), "norm": (RMSNorm,), "ffn": (type(None),)}
_UNUSED = ("lm_head.weight",)

ARCHITECTURES = (
    Architecture(
        "MambaForCausalLM",
        "mamba",
        table=_MAMBA,
        read=_read_mamba,
        write=_write_mamba,
        parts={**_COMMON, "mixers": (Mamba,)},
        unused=_UNUSED,
    ),
    Architecture(
        "Mamba2ForCausalLM",
        "mamba2",
        table=_MAMBA2,
        read=_read_mamba2,
        write=_write_mamba2,
        parts={**_COMMON, "mixers": (Mamba2,)},
        unused=_UNUSED,
    ),
)
