"""Proofs that GPU kernels share: no races, also where Pallas' interpreter sees none by itself; no other chips."""

import contextlib
import functools

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.dispatch import Implementation


def detect_races(monkeypatch, table: dict, function) -> None:
    """Adds "gpu_checked" to an op's table: its kernels interpreted so that two accesses that nothing orders raise.

    Memory starts as NaN. The detector does not see what `wgmma` reads, so that each operand is loaded, too; unlike
    loads, `wgmma` itself needs no fence before a copy to the same memory.
    """
    multiply = plgpu.wgmma

    def wgmma(sums, *operands):
        for x in operands:
            x[...]
        plgpu.commit_smem()
        multiply(sums, *operands)

    monkeypatch.setattr(plgpu, "wgmma", wgmma)
    params = plgpu.InterpretGPUParams(detect_races=True)
    checked = Implementation(functools.partial(function, interpret=params), automatic=False)
    monkeypatch.setitem(table, "gpu_checked", checked)


@contextlib.contextmanager
def refused_for_the_chip():
    """What is traced within is for an Ampere GPU, and has to be refused because of that."""
    device = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match="cannot: device kind 'NVIDIA A100-SXM4-80GB'; it is for"),
    ):
        yield
