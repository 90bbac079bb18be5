"""Calls of Pallas kernels for TPU, which has no integers of 64 bits."""

import jax
from jax.experimental import pallas as pl


def tpu_call(kernel, **options):
    """`pl.pallas_call(kernel, **options)` of arrays of at most 32 bits, whatever `jax_enable_x64` says.

    In that mode the indices of blocks, the counters of loops and all other integers that nobody gave a type would be of
    64 bits, and the compiler refuses the kernel.
    """

    def call(*arrays):
        # Here it is that kernel and index maps are traced.
        with jax.enable_x64(False):
            return pl.pallas_call(kernel, **options)(*arrays)

    return call
