"""The recorded folders (`tests/fixtures/record_hf.py` and those of authors' code), and folders made from them."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

RECORDED = Path(__file__).parents[1] / "fixtures" / "hf"
FAMILIES = sorted(folder.name for folder in RECORDED.iterdir())


def tensors(folder):
    """All tensors of a folder, of however many files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def expected(family):
    """Tokens and mask, and what transformers computed: logits, or the last hidden states of an encoder."""
    with np.load(RECORDED / family / "expected.npz") as file:
        output = file["logits"] if "logits" in file else file["last_hidden_state"]
        return file["tokens"], file["mask"], output


def variant(folder, family, *, change=None, **entries):
    """A copy of a recorded folder with other entries in its config and `change(tensors)` as its tensors."""
    folder.mkdir()
    source = RECORDED / family
    (folder / "config.json").write_text(json.dumps({**config(source), **entries}))
    if change is None:
        shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    else:
        save_file(change(tensors(source)), folder / "model.safetensors")
    return folder


def assert_same_tensors(actual, wanted):
    """The same names, dtypes, shapes and bits."""
    assert actual.keys() == wanted.keys()
    for name, array in wanted.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(bits(actual[name]), bits(array), err_msg=name)


def bits(array):
    return np.asarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
