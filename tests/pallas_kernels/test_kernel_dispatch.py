import logging

import pytest

import pallas_kernels
from pallas_kernels.dispatch import Implementation, select

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


def test_every_op_is_listed_with_a_reference():
    assert set(pallas_kernels.OPS) == {"attention", "linear_attention", "grouped_matmul"}
    for name, implementations in pallas_kernels.OPS.items():
        assert callable(getattr(pallas_kernels, name))
        assert "reference" in implementations and len(implementations) > 1
