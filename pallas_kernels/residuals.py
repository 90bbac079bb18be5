"""What the forward pass of an op leaves for its backward pass, under a name that a rematerialisation policy can keep.

    jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(pallas_kernels.residuals.NAME))

recomputes everything in `f` but attention, linear attention and scans: their results are about as large as their
arguments, and cost most. Of attention the arguments are named too.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "pallas_kernels.residuals"


def keep(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, named."""
    return tuple(checkpoint_name(x, NAME) for x in arrays)
