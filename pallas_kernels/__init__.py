"""Attention, scan and mixture-of-experts kernels for JAX: one folder an op, one file a backend.

Every op is a pure function that works under `jax.jit`, `jax.vmap`, `jax.remat` and `jax.shard_map`, and all but those
of decoding are differentiable by a custom VJP; `implementation=None` takes the best for the platform. Those over time
take an `axis_name`, where a mesh splits it. `OPS` lists them with their implementations.
"""

from pallas_kernels import attention as _attention
from pallas_kernels import decode_attention as _decode_attention
from pallas_kernels import grouped_matmul as _grouped_matmul
from pallas_kernels import linear_attention as _linear_attention
from pallas_kernels import selective_scan as _selective_scan
from pallas_kernels import softmax as _softmax
from pallas_kernels import ssd_scan as _ssd_scan
from pallas_kernels.attention import attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.linear_attention import (
    LinearAttentionState,
    linear_attention,
    linear_attention_decode,
)
from pallas_kernels.selective_scan import selective_scan, selective_scan_decode
from pallas_kernels.softmax import cross_entropy, linear_cross_entropy, softmax
from pallas_kernels.ssd_scan import ssd_decode, ssd_scan

OPS = {
    "attention": _attention.IMPLEMENTATIONS,
    "decode_attention": _decode_attention.IMPLEMENTATIONS,
    "linear_attention": _linear_attention.IMPLEMENTATIONS,
    "grouped_matmul": _grouped_matmul.IMPLEMENTATIONS,
    "selective_scan": _selective_scan.IMPLEMENTATIONS,
    "ssd_scan": _ssd_scan.IMPLEMENTATIONS,
    "softmax": _softmax.SOFTMAX_IMPLEMENTATIONS,
    "cross_entropy": _softmax.CROSS_ENTROPY_IMPLEMENTATIONS,
    "linear_cross_entropy": _softmax.LINEAR_CROSS_ENTROPY_IMPLEMENTATIONS,
}

__all__ = [
    "OPS",
    "LinearAttentionState",
    "attention",
    "cross_entropy",
    "decode_attention",
    "grouped_matmul",
    "linear_attention",
    "linear_attention_decode",
    "linear_cross_entropy",
    "selective_scan",
    "selective_scan_decode",
    "softmax",
    "ssd_decode",
    "ssd_scan",
]
