"""Loading onto a mesh, and within a bound on memory."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hf_folders import RECORDED, config, tensors
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from effjax import pytree
from effjax.interop import load_hf, save_hf
from effjax.interop.shards import Shards
from effjax.training import sharding


@pytest.mark.parametrize(("family", "scan_layers"), [("mixtral", True), ("mamba2", False)])
def test_each_device_of_a_mesh_gets_its_part_and_no_more_is_read(
    family, scan_layers, monkeypatch, tmp_path
):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})

    def place(path, shape):
        return NamedSharding(mesh, sharding.parameter_spec(path, shape, mesh))

    num_read = []
    read_into = Shards.read_into

    def counted(self, name, spans, destination):
        num_read.append(destination.size)
        read_into(self, name, spans, destination)

    monkeypatch.setattr(Shards, "read_into", counted)
    options = {"scan_layers": scan_layers}
    model, variables = load_hf(RECORDED / family, shardings=place, **options)
    leaves = pytree.select(variables["params"], ".*")
    for path, leaf in leaves.items():
        assert leaf.sharding == place(path, leaf.shape), path
    assert any(not leaf.is_fully_replicated for leaf in leaves.values())
    # A device reads its own part; what is whole everywhere is read once.
    parts = [
        leaf.size
        if leaf.is_fully_replicated
        else sum(shard.data.size for shard in leaf.addressable_shards)
        for leaf in leaves.values()
    ]
    assert sum(num_read) <= sum(parts)
    _, here = load_hf(RECORDED / family, **options)
    jax.tree.map(np.testing.assert_array_equal, variables, here)
    save_hf(tmp_path / "saved", model, variables)
    actual, wanted = tensors(tmp_path / "saved"), tensors(RECORDED / family)
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


MEASURE = """
import json, sys
import jax
from effjax.interop import load_hf

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

load_hf(sys.argv[2])  # what importing, tracing and the runtime take
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = memory("VmRSS")
model, variables = load_hf(sys.argv[1], **json.loads(sys.argv[3]))
print(sum(leaf.nbytes for leaf in jax.tree.leaves(variables)), memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scan_layers": True}])
def test_peak_memory_is_little_more_than_the_weights(options, tmp_path, rng):
    """Of a process that loads 130 MB: the shapes of a Llama, with the embedding a fifth of it."""
    size = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "vocab_size": 13000,
        "num_hidden_layers": 8,
    }
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**config(RECORDED / "mistral"), **size, "head_dim": None})
    )
    widths = {16: 512, 20: 1536, 50: 13000, 8: 256}  # of the recorded model, and of this
    small = tensors(RECORDED / "mistral")
    large = {}
    for layer in range(8):
        large |= {name.replace("layers.0", f"layers.{layer}"): t for name, t in small.items()}
    noise = rng.standard_normal(512 * 13000, np.float32)
    large = {
        name: noise[: np.prod([widths[n] for n in t.shape])].reshape([widths[n] for n in t.shape])
        for name, t in large.items()
    }
    save_file(large, folder / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(folder), str(RECORDED / "mistral")]
    command.append(json.dumps(options))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    weights, peak = map(int, result.stdout.split())
    assert weights == sum(t.nbytes for t in large.values()) > 1e8
    print(f"peak is {peak / weights:.3f} of the weights")
    assert 0.8 * weights < peak < 1.3 * weights
