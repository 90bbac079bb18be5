"""The cases of each op: `CASES[op](quick)`, with `quick` the smallest shape only."""

from collections.abc import Callable

from benchmarks.kernels.case import Case
from benchmarks.kernels.cases.attention import attention_cases
from benchmarks.kernels.cases.decode_attention import decode_attention_cases
from benchmarks.kernels.cases.grouped_matmul import grouped_matmul_cases
from benchmarks.kernels.cases.linear_attention import linear_attention_cases
from benchmarks.kernels.cases.scans import selective_scan_cases, ssd_scan_cases
from benchmarks.kernels.cases.softmax import (
    cross_entropy_cases,
    linear_cross_entropy_cases,
    softmax_cases,
)

CASES: dict[str, Callable[[bool], list[Case]]] = {
    "attention": attention_cases,
    "decode_attention": decode_attention_cases,
    "linear_attention": linear_attention_cases,
    "selective_scan": selective_scan_cases,
    "ssd_scan": ssd_scan_cases,
    "grouped_matmul": grouped_matmul_cases,
    "softmax": softmax_cases,
    "cross_entropy": cross_entropy_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}
