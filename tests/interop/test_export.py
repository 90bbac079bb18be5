"""Exported programs give the model's numbers, with the kernels of their platform."""

import functools
import json

import jax
import numpy as np
import pytest
from tiny_models import random_variables

from effjax import models
from effjax.interop import InteropError, load_export, save_export

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "d_model": 32, "max_seq_len": 64}
LENGTH = 16


@pytest.fixture(scope="module")
def adamoe():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    model = models.create("adamoe", **SMALL, num_layers=1, **{"ffn.dispatch": "dropless"})
    return model, random_variables(model, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def folder(adamoe, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "adamoe"
    save_export(path, *adamoe, batch_size=3, length=LENGTH)
    return path


def test_the_program_gives_the_numbers_of_the_model(adamoe, folder, rng):
    model, variables = adamoe
    tokens = rng.integers(0, VOCAB, size=(3, LENGTH))
    segment_ids = np.repeat([[1, 2, 0]], 3, axis=0).repeat([7, 5, 4], axis=1)
    expected = jax.jit(model.apply)(variables, tokens, segment_ids=segment_ids).logits
    exported = load_export(folder)
    actual = exported(tokens, segment_ids)
    assert actual.keys() == {"logits"}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    is_text = segment_ids > 0
    close(actual["logits"][is_text], expected[is_text])
    # Fewer rows and tokens are padded; nothing that comes later has a say in the first segment.
    close(exported(tokens[:2, :7])["logits"], expected[:2, :7])


@pytest.mark.parametrize(
    ("platform", "kernel"), [("cpu", None), ("tpu", "tpu_custom_call"), ("cuda", None)]
)
def test_each_platform_has_its_kernels(folder, platform, kernel):
    program = load_export(folder, platform).program
    assert program.platforms == (platform,)
    assert ("tpu_custom_call" in program.mlir_module()) == (kernel == "tpu_custom_call")


def test_an_embedder_exports_its_embeddings(tmp_path, rng):
    model = models.create("matryoshka", **SMALL, num_layers=2)
    tokens = rng.integers(0, VOCAB, size=(2, 8))
    variables = random_variables(model, rng)
    save_export(tmp_path / "e", model, variables, batch_size=2, length=8, platforms=["cpu"])
    actual = load_export(tmp_path / "e")(tokens)
    expected = jax.jit(model.apply)(variables, tokens).embeddings
    np.testing.assert_allclose(actual["embeddings"], expected, rtol=1e-5, atol=1e-5)


def test_errors(adamoe, folder, tmp_path):
    with pytest.raises(InteropError, match="has an export already"):
        save_export(folder, *adamoe, batch_size=1, length=4)
    with pytest.raises(InteropError, match=r"length=65; valid: .* 1 to max_seq_len=64"):
        save_export(tmp_path / "a", *adamoe, batch_size=1, length=65)
    with pytest.raises(InteropError, match=r"platforms has \['rocm'\]; valid: of \['cpu'"):
        save_export(tmp_path / "a", *adamoe, batch_size=1, length=4, platforms=["rocm"])
    model, variables = adamoe
    with pytest.raises(InteropError, match="the variables are not those of the model"):
        save_export(tmp_path / "a", model.clone(num_layers=2), variables, batch_size=1, length=4)
    assert not (tmp_path / "a").exists()
    with pytest.raises(InteropError, match=r"export\.json is no manifest"):
        load_export(tmp_path)
    with pytest.raises(ValueError, match=r"tokens has shape \(4, 16\).*at most \[3, 16\]"):
        load_export(folder)(np.zeros((4, LENGTH), int))


@pytest.mark.parametrize("broken", ["cpu.stablehlo", "model.safetensors"])
def test_broken_files_are_named(folder, tmp_path, broken):
    for file in folder.iterdir():
        whole = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            whole[: len(whole) // 2] if file.name == broken else whole
        )
    with pytest.raises(InteropError, match=f"{broken} is missing or broken"):
        load_export(tmp_path)
    manifest = json.loads((folder / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps(manifest | {"platforms": ["tpu"]}))
    with pytest.raises(InteropError, match="has no program for 'cpu'; valid: tpu"):
        load_export(tmp_path)
