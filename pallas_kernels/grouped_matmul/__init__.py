"""Grouped matrix product: signature, validation and dispatch.

What serves where, the preferred first:

| implementation | platform | what it is |
| --- | --- | --- |
| "tpu" | TPU | `jax.lax.ragged_dot`, XLA's own grouped kernels |
| "gpu" | GPU (Hopper, bfloat16), only by name | two Pallas kernels, Mosaic GPU |
| "xla" | all | a loop over groups and their row tiles |

"gpu_interpret" is "gpu" run anywhere by Pallas' interpreter.

On TPU `ragged_dot` was compared with megablox (`jax.experimental.pallas.ops.tpu.megablox`) before writing anything, by
static schedule for v5e (libtpu 0.0.51): M = 4096, K = 1024, N = 4096, 8 groups, bfloat16; bundles of a grid step, times
the 39 row tiles that are visited at most, times the steps along N or K.

| product | ragged_dot | megablox, tiles of 128 x 1024 x 1024 |
| --- | --- | --- |
| out | 2195 x 39 x 4 = 342k | 1974 x 39 x 4 = 308k |
| d_lhs | 1960 x 39 x 4 = 306k | 1899 x 39 x 4 = 296k |
| d_rhs | 1751 x 39 x 8 = 546k | 2015 x 39 x 4 = 314k |

Megablox takes 3 to 10 % fewer, 42 % for d_rhs, but needs tiles chosen by hand for each shape, M a multiple of them, and
some dozens of small programs before each product to lay out the visits. Neither has been timed on a TPU.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, call, interpreted, on_gpu
from pallas_kernels.grouped_matmul import reference, tpu, xla

_ON_GPU = on_gpu(f"{__name__}.gpu", "grouped_matmul")
IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.grouped_matmul, platforms=("tpu",)),
    "gpu": _ON_GPU,
    "xla": Implementation(xla.grouped_matmul),
    "reference": Implementation(reference.grouped_matmul),
    "gpu_interpret": interpreted(_ON_GPU),
}


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Rows sorted by group, each times its group's matrix: what a dropless mixture of experts is made of.

    The first `group_sizes[0]` rows of `lhs` are multiplied by `rhs[0]`, the next `group_sizes[1]` by `rhs[1]`, and
    so on; rows past the sum give 0 and cost (next to) nothing. Differentiable in lhs and rhs. Gale et al., "MegaBlocks:
    efficient sparse training with mixture-of-experts", arXiv 2211.15841, section 5.

    Args:
        lhs: float [M, K].
        rhs: float [G, K, N].
        group_sizes: int [G], not negative, of sum at most M. The values are not checked.
        implementation: "tpu", "gpu", "xla", "reference" or "gpu_interpret"; None takes the best for this platform,
            and "gpu" only by name.

    Returns:
        [M, N] in lhs's dtype, accumulated in at least float32.

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    for name, x, ndim, axes in (("lhs", lhs, 2, "[M, K]"), ("rhs", rhs, 3, "[G, K, N]")):
        if jnp.ndim(x) != ndim:
            raise ValueError(f"grouped_matmul: {name} must be {axes}, not of shape {jnp.shape(x)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"grouped_matmul: {name} must be floating point, not {x.dtype}")
        if 0 in x.shape:
            raise ValueError(f"grouped_matmul: {name} has an axis of size 0: {x.shape}")
    if lhs.dtype != rhs.dtype:
        raise ValueError(
            f"grouped_matmul: rhs has dtype {rhs.dtype} but lhs has {lhs.dtype}; cast one"
        )
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(
            f"grouped_matmul: rhs {rhs.shape} must have K={lhs.shape[1]} rows, as lhs has columns"
        )
    if jnp.shape(group_sizes) != rhs.shape[:1]:
        raise ValueError(
            f"grouped_matmul: group_sizes must be of shape {rhs.shape[:1]}, not {jnp.shape(group_sizes)}"
        )
    if not jnp.issubdtype(jnp.result_type(group_sizes), jnp.integer):
        raise ValueError(
            f"grouped_matmul: group_sizes must be integer, not {jnp.result_type(group_sizes)}"
        )
    group_sizes = jnp.asarray(group_sizes, jnp.int32)
    return call("grouped_matmul", IMPLEMENTATIONS, implementation, lhs, rhs, group_sizes)
