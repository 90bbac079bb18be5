"""What cannot be loaded is refused by name, with nothing half-loaded."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import RECORDED, config, tensors, variant
from safetensors.numpy import save_file

from effjax.interop import InteropError, load_hf, save_hf

LAST = "model.layers.1.mlp.down_proj.weight"


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        (
            "llama",
            {"architectures": ["LlamaForCausalLLM"]},
            r"unknown architecture 'LlamaForCausalLLM'; did you mean 'LlamaForCausalLM'\? \(known: .*Mixtral",
        ),
        (
            "llama",
            {"architectures": None, "model_type": "t5"},
            r"unknown model_type 't5' .*known: .*llama",
        ),
        (
            "llama",
            {"hidden_act": "gelu_fast"},
            "hidden_act='gelu_fast' is not supported; valid: 'silu'",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
            "rope_scaling: rope_type='yarn' is not supported; valid: 'default', 'linear', 'llama3'",
        ),
        (
            "llama",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "linear"}},
            "rope_parameters: 'factor' is missing",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "default", "mrope_section": [1]}, "rope_parameters": None},
            r"\{'mrope_section': \[1\]\} is not supported",
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.*is not supported"),
        ("llama", {"hidden_size": "16"}, "hidden_size is '16'; valid: int"),
        (
            "llama",
            {"rms_norm_eps": float("nan")},
            "rms_norm_eps is nan; valid: finite, and not negative",
        ),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0; valid: at least 1"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; valid: bool"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_key_value_heads=3 must divide|num_kv_heads=3 must divide",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types=.*for each of the 2 layers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported; valid: None"),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 2},
            "decoder_sparse_step=2 is not supported; valid: 1",
        ),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True is",
        ),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is",
        ),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias=False is not supported"),
        (
            "mamba2",
            {"time_step_limit": [0.0, 0.1]},
            r"time_step_limit=\[0.0, 0.1\] is not supported",
        ),
    ],
)
def test_configs(family, entries, message, tmp_path):
    folder = variant(tmp_path / "folder", family, **entries)
    with pytest.raises(InteropError, match=message) as refused:
        load_hf(folder)
    assert "config.json" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(LAST), f"missing: {LAST}"),
        (lambda t: {**t, "extra.weight": np.ones(3, np.float32)}, "unexpected: extra.weight"),
        (lambda t: {**t, LAST: t[LAST].T.copy()}, rf"{LAST} is \(20, 16\) and not \(16, 20\)"),
        (
            lambda t: {**t, LAST: t[LAST].astype(np.int8)},
            f"'{LAST}' has dtype I8; valid: F64, F32, F16, BF16",
        ),
    ],
)
def test_tensors(change, message, tmp_path):
    with pytest.raises(InteropError, match=message):
        load_hf(variant(tmp_path / "folder", "mistral", change=change))


def test_stacked_tensors_of_several_dtypes(tmp_path):
    expert = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    change = lambda t: {**t, expert: t[expert].astype(jnp.bfloat16)}  # noqa: E731
    folder = variant(tmp_path / "folder", "mixtral", change=change)
    with pytest.raises(InteropError, match="ffn/experts/gate is of tensors of bfloat16, float32"):
        load_hf(folder)
    _, variables = load_hf(folder, dtype="float32")
    gate = variables["params"]["depth"]["layers"]["blocks_0"]["ffn"]["experts"]["gate"]
    np.testing.assert_array_equal(gate[3], tensors(folder)[expert].T.astype(np.float32))


def test_float64_is_not_narrowed_in_silence(tmp_path):
    change = lambda t: {k: v.astype(np.float64) for k, v in t.items()}  # noqa: E731
    folder = variant(tmp_path / "folder", "mistral", change=change)
    with pytest.raises(InteropError, match="is float64; valid: give a narrower dtype"):
        load_hf(folder)
    with pytest.raises(InteropError, match="dtype is float64; valid: give a narrower dtype"):
        load_hf(folder, dtype="float64")
    model, variables = load_hf(folder, dtype="float16")
    assert model.dtype == variables["params"]["embed"]["embedding"].dtype == "float16"


def sharded(folder):
    """A folder of several shards, and the last of them."""
    save_hf(folder, *load_hf(RECORDED / "qwen2"), max_shard_bytes=4000)
    return sorted(folder.glob("*.safetensors"))


def test_a_missing_shard(tmp_path):
    *_, last = sharded(tmp_path / "folder")
    last.unlink()
    with pytest.raises(InteropError, match=f"{last.name} is missing"):
        load_hf(tmp_path / "folder")


def test_a_truncated_shard(tmp_path, rng):
    *_, last = sharded(tmp_path / "folder")
    whole = last.read_bytes()
    last.write_bytes(whole[: rng.integers(len(whole))])
    with pytest.raises(InteropError, match=f"{last.name} is truncated"):
        load_hf(tmp_path / "folder")


def test_a_shard_without_what_the_index_lists(tmp_path):
    *_, last = sharded(tmp_path / "folder")
    save_file({"another.weight": np.ones(3, np.float32)}, last)
    with pytest.raises(InteropError, match=f"{last.name} lacks tensors that .* lists: model"):
        load_hf(tmp_path / "folder")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of shards"),
        ("[]", "is no index of shards"),
        (
            '{"weight_map": {"a": "../b.safetensors"}}',
            "'../b.safetensors'; valid: a file of the folder",
        ),
    ],
)
def test_a_malformed_index(index, message, tmp_path):
    sharded(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InteropError, match=message):
        load_hf(tmp_path / "folder")


def test_pickle_is_never_read(tmp_path):
    folder = variant(tmp_path / "folder", "qwen2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        InteropError, match=r"pickle is not read.*pytorch_model.bin.*valid: model.safetensors"
    ):
        load_hf(folder)


def test_what_is_no_model_folder(tmp_path):
    with pytest.raises(InteropError, match="'meta-llama/Llama-3' is no folder"):
        load_hf("meta-llama/Llama-3")
    with pytest.raises(InteropError, match=r"has no config\.json"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InteropError, match="holds a list; valid: a JSON object"):
        load_hf(tmp_path)
    with pytest.raises(InteropError, match="dtype is 'int32'; valid: a floating-point dtype"):
        load_hf(RECORDED / "qwen2", dtype="int32")


def test_entries_that_are_not_known_are_named_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_hf(RECORDED / "qwen2")
        assert not caplog.records
        load_hf(variant(tmp_path / "folder", "qwen2", logit_scale=2.0))
    assert "not known and not read: {'logit_scale': 2.0}" in caplog.text


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer.")),
        (
            "bert",
            lambda name: (
                "bert."
                + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            ),
        ),
    ],
)
def test_names_of_older_checkpoints(family, rename, tmp_path):
    folder = variant(
        tmp_path / "folder", family, change=lambda t: {rename(k): v for k, v in t.items()}
    )
    assert not tensors(folder).keys() & tensors(RECORDED / family).keys() - {"lm_head.weight"}
    variables = [load_hf(f)[1] for f in (folder, RECORDED / family)]
    jax.tree.map(np.testing.assert_array_equal, *variables)


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        (
            "llama3",
            {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}},
        ),
        ("qwen2", {"use_mrope": False, "max_window_layers": 24, "sliding_window": 32768}),
        (
            "mamba",
            {"d_inner": 32, "d_model": 16, "n_layer": 2, "ssm_cfg": {}, "rms_norm": True}
            | {"fused_add_norm": True, "pad_vocab_size_multiple": 8},
        ),
        ("mamba2", {"norm_before_gate": True, "A_initializer_range": [1, 16]}),
    ],
)
def test_entries_of_published_configs_are_known(family, entries, tmp_path, caplog):
    model, _ = load_hf(variant(tmp_path / "folder", family, **entries))
    assert model == load_hf(RECORDED / family)[0]
    assert "not known" not in caplog.text


def test_tensors_that_others_determine_are_passed_over(tmp_path):
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    embedding = "model.embed_tokens.weight"
    extra = lambda t: {**t, inv_freq: np.ones(2, np.float32), "lm_head.weight": t[embedding]}  # noqa: E731
    folder = variant(tmp_path / "folder", "qwen3", change=extra)
    assert config(folder)["tie_word_embeddings"]
    _, variables = load_hf(folder)
    assert "head" not in variables["params"]
