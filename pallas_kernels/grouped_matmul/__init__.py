"""Grouped matrix product: signature, validation and dispatch.

What serves where, the preferred first:

| implementation | platform | what it is |
| --- | --- | --- |
| "tpu" | TPU (bfloat16, float32) | two Pallas kernels |
| "gpu" | GPU (Hopper, bfloat16), only by name | two Pallas kernels, Mosaic GPU |
| "xla" | all | a loop over groups and their row tiles |

"tpu_interpret" and "gpu_interpret" are those run anywhere by Pallas' interpreters.

On TPU there are also `jax.lax.ragged_dot`, XLA's own kernels, and megablox
(`jax.experimental.pallas.ops.tpu.megablox`), which `jax.shard_map` refuses where it checks types: what it returns does
not say which mesh axes it varies over. Static cycles of forward and backward, bfloat16, 8 groups
(`python -m benchmarks.kernels --op=grouped_matmul`); megablox has tiles of 128 x 1024 x 1024:

| M, K, N | chip | "tpu" | ragged_dot | megablox |
| --- | --- | --: | --: | --: |
| 4096, 1024, 4096 | v5e | 908k | 1248k | 962k |
| | v6e | 325k | 538k | 541k |
| 1024, 256, 512 | v5e | 21k | 22k | 28k |
| | v6e | 12k | 14k | 20k |

None has been timed on a TPU. Of the forward alone at the smaller shape the kernel and ragged_dot take as many: 6.6k
both on v5e, 4.4k both on v6e.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import call, kernels_or_xla
from pallas_kernels.grouped_matmul import reference, xla

IMPLEMENTATIONS = kernels_or_xla(
    f"{__name__}.tpu", xla, reference, "grouped_matmul", f"{__name__}.gpu"
)


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
        implementation: "tpu", "gpu" (Hopper), "xla", "reference", or "tpu_interpret" and "gpu_interpret", the kernels
            run anywhere by Pallas' interpreters; None takes the best for this platform, and "gpu" only by name.

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
