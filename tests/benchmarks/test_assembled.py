"""The benchmark of what the GPU's assembler says: how its report is read, the page, and kernels that do not spill."""

import pytest

from benchmarks.kernels import assembled
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


def test_a_report_is_read_and_shown():
    figures = assembled.read(REPORT, RESOURCES)
    assert figures == {
        "registers": 168,
        "spilled_bytes": [52, 48],
        "shared_bytes": 198656,
        "warnings": ["'setmaxnreg' ignored to maintain compatibility."],
    }
    row = {"op": "softmax", "shape": "[2, 3]", "pass": "forward", "kernel": "k"} | figures
    page = assembled.document({"versions": {"jax": "1"}, "rows": [row]})
    assert (
        "| softmax | [2, 3] | forward | k | 168 | 52 + 48 | 194 "
        "| 'setmaxnreg' ignored to maintain compatibility. |\n\njax 1\n" in page
    )


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match="op='sort' is unknown; valid: attention"):
        assembled.run(["sort"])


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_available("gpu"), reason="needs JAX's CUDA plugin")
def test_kernels_are_assembled_without_warnings_and_spill_next_to_nothing():
    rows = assembled.run(["attention", "decode_attention", "softmax"])["rows"]
    assert {row["kernel"] for row in rows} >= {"attention_backward_keys", "softmax_gradient"}
    assert all(max(row["spilled_bytes"]) <= 128 and not row["warnings"] for row in rows), rows
