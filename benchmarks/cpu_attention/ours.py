"""The side of `pallas_kernels.attention`: arrays are [B, T, H, D], as the projections of a model leave them."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.cpu_attention.shapes import RUNS, SHAPES
from benchmarks.turns import serve
from pallas_kernels import attention


def program(name: str):
    """`RUNS` runs of the output and of the gradients of q, k and v."""
    q, k, v, d_out = (
        jax.random.normal(key, SHAPES[name], jnp.float32)
        for key in jax.random.split(jax.random.key(0), 4)
    )

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(functools.partial(attention, causal=True), q, k, v)
        return out, pull(d_out)

    def runs():
        for _ in range(RUNS[name]):
            jax.block_until_ready(run(q, k, v, d_out))

    return runs


if __name__ == "__main__":
    serve({name: program(name) for name in SHAPES})
