"""The benchmark of what the GPU's assembler says: how its report is read, the page, and kernels that do not spill."""

import pytest

from benchmarks.kernels import assembled, sass
from pallas_kernels import topology

# In the form of CUDA 13.5's nvJitLink.
REPORT = """
ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain compatibility.
ptxas warning : Registers are spilled to local memory in function 'k_mosaic_gpu_kernel', 52 bytes spill stores
ptxas info    : Compiling entry function 'k_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for k_mosaic_gpu_kernel
ptxas         .     40 bytes stack frame, 52 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 17 bytes smem
"""
RESOURCES = "Resources(smem_scratch_bytes=198656, tmem_scratch_cols=0, barrier_counts=Counter())"
# In the form of CUDA 13.5's nvdisasm, as Mosaic GPU writes it: a loop with a branch over two instructions, and a wait.
SASS = """
.text.k_mosaic_gpu_kernel:
   -:-:1:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
.L_x_1:
   -:-:-:Y:05        /*0010*/              @!P1 BRA `(.L_x_2)
   -:-:-:Y:01        /*0020*/                   FSEL R1, R2, R3, P2
   -:-:-:Y:01        /*0030*/                   FSEL R2, R3, R4, P2
.L_x_2:
   -:-:-:Y:02        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R8
   1:-:-:Y:05        /*0050*/              @!P1 BRA `(.L_x_4)
.L_x_3:
   -:-:-:Y:01        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
   -:-:-:Y:01        /*0070*/                   HGMMA.64x64x16.F32.BF16 R88, R4, gdesc[UR4].tnspB, R88, gsb0
   -:-:-:Y:06        /*0080*/               @P1 BRA `(.L_x_1)
   -:-:-:Y:05        /*0090*/                   EXIT
.L_x_4:
   -:-:-:Y:02        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R8
   1:-:-:Y:05        /*00b0*/              @!P1 BRA `(.L_x_4)
   -:-:-:Y:05        /*00c0*/                   BRA `(.L_x_3)
"""


def test_a_report_is_read_and_shown():
    figures = assembled.read(REPORT, RESOURCES, SASS)
    assert figures == {
        "registers": 168,
        "spilled_bytes": [52, 48],
        "shared_bytes": 198656,
        "loops": [{"instructions": 6, "tensor_cycles": 64 + 32}],
        "warnings": ["'setmaxnreg' ignored to maintain compatibility."],
    }
    row = {"op": "softmax", "shape": "[2, 3]", "pass": "forward", "kernel": "k"} | figures
    page = assembled.document({"versions": {"jax": "1"}, "rows": [row]})
    assert (
        "| softmax | [2, 3] | forward | k | 168 | 52 + 48 | 194 | 6, 96 "
        "| 'setmaxnreg' ignored to maintain compatibility. |\n\njax 1\n" in page
    )


def test_code_without_loops_or_products_is_read():
    without_loop = SASS.replace("@P1 BRA `(.L_x_1)", "NOP")
    assert sass.loops(without_loop) == [sass.Loop(8, 64 + 32)]
    assert sass.loops(without_loop.replace("HGMMA", "FFMA")) == []
    assert sass.loops(SASS.replace("HGMMA", "FFMA")) == [sass.Loop(6, 0)]


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match="op='sort' is unknown; valid: attention"):
        assembled.run(["sort"])


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_available("gpu"), reason="needs JAX's CUDA plugin")
def test_kernels_are_assembled_without_warnings_and_spill_next_to_nothing():
    rows = assembled.run(["attention", "decode_attention", "softmax"])["rows"]
    assert {row["kernel"] for row in rows} >= {"attention_backward_keys", "softmax_gradient"}
    assert all(max(row["spilled_bytes"]) <= 128 and not row["warnings"] for row in rows), rows
