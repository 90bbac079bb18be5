"""Writing models: the layout of the files, what goes along, and what no architecture can express."""

import json

import jax
import numpy as np
import pytest
from hf_folders import RECORDED, assert_same_tensors, config, tensors
from safetensors import safe_open

from effjax import models
from effjax.depth import Recursive
from effjax.ffn import Dense, Gated, TopK
from effjax.heads import Untied
from effjax.interop import InteropError, families, load_hf, save_hf
from effjax.interop.architecture import spelled_out
from effjax.interop.entries import Entries
from effjax.mixers import Attention, Mamba2, ShortConv, SlidingWindow, TaylorLinear
from effjax.models import DecoderLM
from effjax.nn import LayerNorm, RMSNorm, TokenEmbedding

SMALL = {"vocab_size": 12, "d_model": 8, "num_layers": 2, "max_seq_len": 16}


def initialised(model):
    """Zeros in the shapes of the model's parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def test_shards_and_their_index(tmp_path):
    model, variables = load_hf(RECORDED / "mixtral")
    save_hf(tmp_path / "saved", model, variables, max_shard_bytes=6000)
    files = sorted(f.name for f in (tmp_path / "saved").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    wanted = tensors(RECORDED / "mixtral")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    for file in files:
        with safe_open(tmp_path / "saved" / file, framework="numpy") as shard:
            assert shard.metadata() == {"format": "pt"}
            names = set(shard.keys())
            assert names == {name for name, where in index["weight_map"].items() if where == file}
            assert len(names) == 1 or sum(wanted[name].nbytes for name in names) <= 6000
    assert_same_tensors(tensors(tmp_path / "saved"), wanted)
    _, again = load_hf(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_what_goes_along_with_the_model(tmp_path):
    like = tmp_path / "like"
    like.mkdir()
    for name in ("tokenizer.json", "generation_config.json"):
        (like / name).write_text(f'"{name}"')
    (like / "README.md").write_text("not a part of the model")
    model, variables = load_hf(RECORDED / "qwen2")
    save_hf(tmp_path / "with_tokenizer", model, variables, like=like)
    assert sorted(f.name for f in (tmp_path / "with_tokenizer").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "with_tokenizer" / "tokenizer.json").read_text() == '"tokenizer.json"'
    assert "eos_token_id" not in config(tmp_path / "with_tokenizer")
    (like / "config.json").write_text(json.dumps({**config(RECORDED / "qwen2"), "eos_token_id": 7}))
    save_hf(tmp_path / "with_ids", model, variables, like=like)
    assert config(tmp_path / "with_ids")["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"mixers": (Attention(qkv_bias=True, out_bias=True),)}, "LlamaForCausalLM"),
        ({"mixers": (SlidingWindow(window=4),)}, "MistralForCausalLM"),
        (
            {"mixers": (Attention(qkv_bias=True), Attention(qkv_bias=True, window=4))},
            "Qwen2ForCausalLM",
        ),
        ({"mixers": (Attention(qk_norm=True),), "head": Untied()}, "Qwen3ForCausalLM"),
        ({"ffn": TopK()}, "MixtralForCausalLM"),
        (
            {"mixers": (Attention(qk_norm=True, qk_norm_over="heads"),), "ffn": TopK()},
            "OlmoeForCausalLM",
        ),
        (
            {"mixers": (Attention(qk_norm=True),), "ffn": TopK(renormalise=False)},
            "Qwen3MoeForCausalLM",
        ),
        (
            {
                "mixers": (Attention(qkv_bias=True),),
                "ffn": TopK(shared_hidden_dim=8, gate_shared=True),
            },
            "Qwen2MoeForCausalLM",
        ),
        (
            {
                "mixers": (Attention(num_heads=2, rope_base=None, qkv_bias=True, out_bias=True),),
                "ffn": Dense(use_bias=True),
                "norm": LayerNorm(),
                "embed": TokenEmbedding(learned_positions=True),
            },
            "GPT2LMHeadModel",
        ),
        ({"depth": Recursive(2, "cycle")}, "MoRLlamaForCausalLM"),
        (
            {
                "mixers": (ShortConv(conv_bias=True), TaylorLinear(), SlidingWindow(window=4)),
                "ffn": Gated(256, "sigmoid"),
            },
            "GPTLMHeadModel",
        ),
        (
            {
                "norm": RMSNorm(zero_centred=True),
                "embed": TokenEmbedding(scale_by_width=True),
                "ffn": Gated(activation="gelu"),
            },
            "GemmaForCausalLM",
        ),
        (
            {"mixers": (Mamba2(head_dim=4, norm_groups=1),), "ffn": None, "norm": RMSNorm(1e-5)},
            "Mamba2ForCausalLM",
        ),
    ],
)
def test_the_architecture_is_the_first_that_expresses_the_model(fields, architecture):
    model = DecoderLM(**SMALL, **fields)
    found = families.of_model(model, None)
    assert found.name == architecture
    written = found.config(model)
    assert written["architectures"] == [architecture]
    again = families.of_config(Entries(written, "written")).model(Entries(written, "written"))
    free = {"dispatch": "dropless", "z_weight": 0.0} if isinstance(model.ffn, TopK) else {}
    wanted = model.clone(ffn=model.ffn.clone(**free)) if free else model
    assert spelled_out(again) == spelled_out(wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ffn": Dense()},
            r"no architecture .*nearest, LlamaForCausalLM, cannot express ffn=.*'dense'",
        ),
        (
            {"depth": Recursive(2, "cycle"), "mixers": (Mamba2(head_dim=4),), "ffn": None},
            "cannot express depth=.*'recursive'",
        ),
        (
            {"ffn": Gated(activation="relu2", use_bias=True), "mixers": (Attention(window=3),)},
            "cannot express",
        ),
        (
            {"mixers": (Attention(logits_soft_cap=3.0),)},
            r"mixers.0.logits_soft_cap=3.0 \(it has None\)",
        ),
        (
            {"ffn": TopK(balancing="bias")},
            r"MixtralForCausalLM, cannot express ffn.balancing='bias'",
        ),
    ],
)
def test_what_no_architecture_expresses_is_named(fields, message, tmp_path):
    with pytest.raises(InteropError, match=message):
        save_hf(tmp_path / "saved", DecoderLM(**SMALL, **fields), {"params": {}})
    assert not (tmp_path / "saved").exists()


def test_refusals(tmp_path):
    model, variables = load_hf(RECORDED / "qwen2")
    refused = {
        "LlamaForCausalLM cannot express mixers.0.out_bias=False": {
            "architecture": "LlamaForCausalLM"
        },
        "architecture: unknown architecture 'Qwen'": {"architecture": "Qwen"},
        "max_shard_bytes is 0; valid: at least 1": {"max_shard_bytes": 0},
        "like is 'nowhere', which is no folder": {"like": "nowhere"},
    }
    for message, options in refused.items():
        with pytest.raises(InteropError, match=message):
            save_hf(tmp_path / "saved", model, variables, **options)
    with pytest.raises(
        InteropError, match=r"variables has \['cache', 'params'\]; valid: 'params' alone"
    ):
        save_hf(tmp_path / "saved", model, {**variables, "cache": {}})
    with pytest.raises(InteropError, match="they differ in final_norm/scale"):
        others = {k: v for k, v in variables["params"].items() if k != "final_norm"}
        save_hf(tmp_path / "saved", model, {"params": others})
    with pytest.raises(InteropError, match="has a model in it"):
        save_hf(RECORDED / "qwen2", model, variables)
    assert not (tmp_path / "saved").exists()


def test_parts_of_one_tensor_are_of_one_dtype(tmp_path):
    model, variables = load_hf(RECORDED / "mamba")
    gate = variables["params"]["depth"]["layers"]["blocks_1"]["mixer"]["gate"]
    gate["kernel"] = gate["kernel"].astype("bfloat16")
    name = "backbone.layers.1.mixer.in_proj.weight"
    with pytest.raises(InteropError, match=f"{name} are of bfloat16, float32; valid: one dtype"):
        save_hf(tmp_path / "saved", model, variables)
    assert not (tmp_path / "saved").exists()


def test_folders_of_before_transformers_5_give_the_same_model(tmp_path):
    """Gemma 3 with the entries of its first configs: what is written, without the list of layers."""
    model, variables = load_hf(RECORDED / "gemma3")
    save_hf(tmp_path / "saved", model, variables)
    old = config(tmp_path / "saved")
    assert "rope_parameters" not in old
    del old["layer_types"]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(old))
    again, _ = load_hf(tmp_path / "saved")
    assert spelled_out(again) == spelled_out(model)


def test_headliners_that_are_llamas_leave_the_house(tmp_path):
    model = models.create("transformer", **SMALL, mixers=(Attention(num_heads=2, num_kv_heads=1),))
    save_hf(tmp_path / "saved", model, initialised(model))
    assert config(tmp_path / "saved")["model_type"] == "llama"
