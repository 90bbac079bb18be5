import logging

import numpy as np
import pytest
from proof import needs_cuda_plugin, needs_libtpu

import pallas_kernels
from pallas_kernels import topology
from pallas_kernels.dispatch import Implementation, Target, select, target

TABLE = {
    "tensor_cores": Implementation(lambda: "tensor_cores", platforms=("gpu",)),
    "by_hand": Implementation(lambda: "by_hand", automatic=False),
    "anywhere": Implementation(lambda: "anywhere"),
}


def test_none_takes_the_first_that_serves_the_platform_and_says_so_once(caplog, request):
    op = request.node.name
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert select(op, TABLE, None)() == "anywhere"
        assert select(op, TABLE, None)() == "anywhere"
        assert select(op, TABLE, "by_hand")() == "by_hand"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "'anywhere'" in messages[0] and "'cpu'" in messages[0]
    assert "'by_hand'" in messages[1] and "caller" in messages[1]


def test_what_cannot_run_here_is_an_error_that_lists_what_can():
    with pytest.raises(
        ValueError, match=r"runs on \['gpu'\] only; .* there is \['by_hand', 'anywhere'\]"
    ):
        select("op", TABLE, "tensor_cores")
    with pytest.raises(ValueError, match=r"'tensor_core' is unknown; .* \['by_hand', 'anywhere'\]"):
        select("op", TABLE, "tensor_core")


def test_what_the_arguments_do_not_allow_is_passed_over_or_refused(caplog):
    def odd(x):
        return f"x={x} is odd" if x % 2 else None

    table = {"even": Implementation(lambda x: "even", refuses=odd), **TABLE}
    assert select("op", table, None, 2)(2) == "even"
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert select("picky", table, None, 3)() == "anywhere"
    assert "'even' cannot: x=3 is odd" in caplog.text
    with pytest.raises(ValueError, match="implementation='even' cannot: x=3 is odd"):
        select("op", table, "even", 3)


@needs_libtpu
def test_the_target_is_the_mesh_in_use_and_not_the_host():
    assert target().platform == "cpu"
    kinds = []
    topology.compile_for("v6e", lambda x: kinds.append(target()) or x, np.zeros(8, np.float32))
    assert kinds == [Target("tpu", "TPU v6 lite")]
    with pytest.raises(ValueError, match="has 4 chips; shape=\\(8,\\) does not fit"):
        topology.mesh("v5e:2x2", (8,))
    with pytest.raises(ValueError, match="'v5e:77x3' is not known to libtpu; valid: v4, v5e"):
        topology.mesh("v5e:77x3")


@needs_cuda_plugin
def test_the_target_may_be_an_absent_gpu():
    kinds = []
    topology.compile_for("h100:2x4", lambda x: kinds.append(target()) or x, np.zeros(8, np.float32))
    assert kinds == [Target("gpu", "NVIDIA H100 80GB HBM3")]
    assert topology.mesh("h100:2x4", (4, 2), ("data", "tensor")).shape == {"data": 4, "tensor": 2}
    with pytest.raises(
        ValueError, match=r"'h100:8' must be h100, or h100 with hosts x GPUs of each"
    ):
        topology.mesh("h100:8")


def test_every_op_is_listed_with_a_reference():
    assert set(pallas_kernels.OPS) == {
        "attention",
        "decode_attention",
        "linear_attention",
        "grouped_matmul",
        "selective_scan",
        "ssd_scan",
        "softmax",
        "cross_entropy",
        "linear_cross_entropy",
    }
    for name, implementations in pallas_kernels.OPS.items():
        assert callable(getattr(pallas_kernels, name))
        assert "reference" in implementations and len(implementations) > 1
