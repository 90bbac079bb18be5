"""Every family against what transformers or the authors' code computed, and there and back again bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import (
    FAMILIES,
    RECORDED,
    assert_same_tensors,
    bits,
    config,
    expected,
    tensors,
    variant,
)

from effjax.depth import ExpertChoice
from effjax.interop import InteropError, families, load_hf, save_hf
from effjax.interop.architecture import spelled_out

# Stacks of layers with parameters of their own; of the others some layers share them.
PLAIN = [family for family in FAMILIES if "recursive" not in config(RECORDED / family)]
# One of each kind of table: fused and joined tensors, experts, layers that differ.
SCANNED = ("based", "gemma2", "mamba2", "qwen3_moe")


@functools.cache
def run(model):
    # The authors of expert choice take the highest scores at evaluation too.
    train = isinstance(getattr(model.depth, "routing", None), ExpertChoice)

    def forward(variables, tokens, mask):
        output = model.apply(variables, tokens, segment_ids=mask, train=train)
        return output.hidden if output.logits is None else output.logits

    return jax.jit(forward)


def logits_of(model, variables, family):
    tokens, mask, _ = expected(family)
    return np.asarray(run(model)(variables, tokens, mask))


def assert_logits(actual, family, atol):
    _, mask, wanted = expected(family)
    assert wanted.std() > 0.5  # so that the tolerance means something
    np.testing.assert_allclose(actual[mask > 0], wanted[mask > 0], atol=atol, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_or_the_authors(family, caplog):
    assert_logits(logits_of(*load_hf(RECORDED / family), family), family, atol=2e-4)
    assert "not known" not in caplog.text


def test_scanned_layers_give_the_same_logits():
    assert_logits(
        logits_of(*load_hf(RECORDED / "llama3", scan_layers=True), "llama3"), "llama3", 2e-4
    )


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in SCANNED else [pytest.mark.slow]) for f in PLAIN],
)
def test_scanned_layers_are_the_others_stacked(family, tmp_path):
    _, unrolled = load_hf(RECORDED / family)
    model, scanned = load_hf(RECORDED / family, scan_layers=True)
    layers, groups = (v["params"]["depth"]["layers"] for v in (unrolled, scanned))
    period = len(groups)  # two where the layers differ
    for block in range(period):
        alike = [layers[f"blocks_{i}"] for i in range(block, model.num_layers, period)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *alike)
        jax.tree.map(np.testing.assert_array_equal, groups[f"blocks_{block}"], stacked)
    save_hf(tmp_path / "saved", model, scanned)
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(RECORDED / family))


@pytest.mark.parametrize(
    "family",
    [
        family if i % 3 == 0 else pytest.param(family, marks=pytest.mark.slow)
        for i, family in enumerate(FAMILIES)
    ],
)
def test_bfloat16_checkpoints_saved_and_loaded_again_have_not_changed(family, tmp_path):
    source = tmp_path / "source"
    variant(source, family, change=lambda t: {k: v.astype(jnp.bfloat16) for k, v in t.items()})
    model, variables = load_hf(source)
    assert model.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}
    output = jax.eval_shape(model.apply, variables, jnp.zeros((1, 4), jnp.int32))
    assert output.hidden.dtype == jnp.bfloat16
    save_hf(tmp_path / "saved", model, variables, like=source)
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(source))
    again, same_variables = load_hf(tmp_path / "saved")
    assert spelled_out(again) == spelled_out(model)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), same_variables, variables
    )
    before, after = config(source), config(tmp_path / "saved")
    assert after["architectures"] == before["architectures"]
    assert after["model_type"] == before["model_type"]
    assert after["eos_token_id"] == before["eos_token_id"] == 2


@pytest.mark.parametrize("family", ["mamba"])  # whose parameters are used in the most ways
def test_bfloat16_parameters_give_nearly_the_same_logits(family):
    model, variables = load_hf(RECORDED / family, dtype="bfloat16")
    # Computed with in float32, so that only the rounding of the parameters shows.
    actual = logits_of(model.clone(dtype="float32"), variables, family)
    error = np.abs(actual - expected(family)[2])[expected(family)[1] > 0]
    assert 1e-4 < error.mean() < 0.05


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_a_pooler_embeds_only_if_the_config_says_so(pooling, tmp_path):
    tokens, mask, hidden = expected("bert")
    pooler = {name: t.astype(np.float64) for name, t in tensors(RECORDED / "bert").items()}
    through = hidden[:, 0] @ pooler["pooler.dense.weight"].T + pooler["pooler.dense.bias"]
    mean = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    wanted = {"mean": mean, "pooler": np.tanh(through)}[pooling]
    model, variables = load_hf(variant(tmp_path / "folder", "bert", pooling=pooling))
    assert model.head.pooler  # its parameters are there, read or not
    embed = jax.jit(lambda v: model.apply(v, tokens, segment_ids=mask).embeddings)
    np.testing.assert_allclose(embed(variables), wanted, atol=2e-4, rtol=0)
    save_hf(tmp_path / "saved", model, variables)
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(RECORDED / "bert"))
    assert load_hf(tmp_path / "saved")[0] == model


def test_an_encoder_may_have_no_pooler(tmp_path):
    def change(given):
        return {name: t for name, t in given.items() if not name.startswith("pooler.")}

    folder = variant(tmp_path / "folder", "bert", change=change)
    model, variables = load_hf(folder)
    assert not model.head.pooler
    save_hf(tmp_path / "saved", model, variables)
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(folder))
    # The config wants what is not there.
    wanting = variant(tmp_path / "wanting", "bert", change=change, pooling="pooler")
    with pytest.raises(InteropError, match=r"missing: pooler\.dense\.bias, pooler\.dense\.weight"):
        load_hf(wanting)


def test_every_architecture_is_recorded():
    recorded = {config(RECORDED / family)["architectures"][0] for family in FAMILIES}
    assert recorded == set(families.names())
