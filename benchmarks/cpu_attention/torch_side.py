"""The side of `torch.nn.functional.scaled_dot_product_attention`; run by a Python that has torch, and only torch.

Arrays are [B, T, H, D] too, and become the [B, H, T, D] that torch takes as a view, as in a model.
"""

import torch
import torch.nn.functional as F

from benchmarks.cpu_attention.shapes import RUNS, SHAPES
from benchmarks.turns import serve


def program(name: str):
    """`RUNS` runs of the output and of the gradients of q, k and v."""
    q, k, v = (torch.randn(SHAPES[name], requires_grad=True) for _ in range(3))
    d_out = torch.randn(SHAPES[name])

    def runs():
        for _ in range(RUNS[name]):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
            torch.autograd.grad(out, (q, k, v), d_out)

    return runs


if __name__ == "__main__":
    serve({name: program(name) for name in SHAPES})
