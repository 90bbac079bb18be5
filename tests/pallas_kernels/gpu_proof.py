"""How GPU kernels are watched for races: Pallas' interpreter, with what it does not see by itself."""

import functools

from jax.experimental.pallas import mosaic_gpu as plgpu

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
