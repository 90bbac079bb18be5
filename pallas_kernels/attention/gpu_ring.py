"""How the warpgroups of a thread block share the work on Hopper, and how tiles travel between them and HBM.

One warpgroup only starts copies from HBM to shared memory, the others compute, so that a tile arrives while another is
computed with (Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.1). They meet at a `Ring`.
"""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Warpgroups of a block that compute; one more copies.
WARPGROUPS = 2
# Tiles in a ring: one is read while the other arrives.
STAGES = 2
# Registers of a thread that computes and of one that copies; together they are all that a multiprocessor has.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24


class Ring(NamedTuple):
    """Tiles on their way from HBM to the warpgroups that compute with them.

    Attributes:
        buffers: of [STAGES, ...] each, in shared memory; a tile is a piece of each.
        filled: barriers [STAGES], which complete when all pieces of the tile have arrived.
        freed: barriers [STAGES], which complete when every warpgroup has done with the tile.
    """

    buffers: tuple
    filled: Any
    freed: Any

    def fill(self, num_tiles, pieces) -> None:
        """Copies `pieces(i)`, references to HBM, for every tile i; to be run by one warpgroup."""

        @pl.loop(0, num_tiles)
        def _(i):
            slot = jax.lax.rem(i, STAGES)

            @pl.when(i >= STAGES)
            def _():
                plgpu.barrier_wait(self.freed.at[slot])

            for piece, buffer in zip(pieces(i), self.buffers, strict=True):
                plgpu.copy_gmem_to_smem(piece, buffer.at[slot], self.filled.at[slot])

    def fold(self, num_tiles, function, carry):
        """`carry = function(i, pieces, carry)` for every tile i; to be run by each warpgroup that computes."""

        def step(i, carry):
            slot = jax.lax.rem(i, STAGES)
            plgpu.barrier_wait(self.filled.at[slot])
            carry = function(i, [buffer.at[slot] for buffer in self.buffers], carry)

            # Nobody waits for the last tiles to be freed.
            @pl.when(i + STAGES < num_tiles)
            def _():
                plgpu.barrier_arrive(self.freed.at[slot])

            return carry

        return jax.lax.fori_loop(0, num_tiles, step, carry)


def ring(*pieces) -> Ring:
    """Scratch for a ring whose tiles consist of `pieces`, (shape, dtype) each."""
    return Ring(
        tuple(plgpu.SMEM((STAGES, *shape), dtype) for shape, dtype in pieces),
        plgpu.Barrier(num_arrivals=len(pieces), num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    )


def run_roles(compute, copy) -> None:
    """`compute(warpgroup)` on the warpgroups that do, `copy()` on the last one."""
    warpgroup = jax.lax.axis_index("warpgroup")

    def role_of_computing():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    def role_of_copying():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()

    jax.lax.cond(warpgroup < WARPGROUPS, role_of_computing, role_of_copying)


def stage(*pairs) -> None:
    """For each pair registers -> shared memory, where products and copies to HBM read."""
    for tile, shared in pairs:
        shared[...] = tile.astype(shared.dtype)
    plgpu.commit_smem()


def write_tile(tile, staged, destination) -> None:
    """Registers -> HBM, through the shared memory `staged`."""
    stage((tile, staged))
    plgpu.copy_smem_to_gmem(staged, destination)
    plgpu.wait_smem_to_gmem(0)
