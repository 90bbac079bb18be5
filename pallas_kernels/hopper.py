"""What kernels for NVIDIA Hopper (Pallas, Mosaic GPU) share: chips, products of tiles, warpgroups and their work.

A tile arrives in shared memory while another is computed with: the first of a block's warpgroups starts the copies
before it computes, and all meet at a `Ring`. No warpgroup is there for the copies alone (Shah et al.,
"FlashAttention-3", arXiv 2407.08608, section 3.1, has one, which gives its registers away): nvJitLink, which assembles
kernels where CUDA comes from PyPI, ignores `setmaxnreg`, and with a third warpgroup gradients spilled their sums.

Of WGMMA, Pallas' interpreter runs products of what is in shared memory, with sums that begin at 0. `add_products` takes
more, as JAX's own attention for Hopper does, which saves instructions by the hundred; the interpreter is given the same
in other words. All else is proven without a GPU as it is. Three things the interpreter does not tell:

- What a warpgroup reads of a ring's tile, it has to read before its last `stage` of that tile, or what it reads has to
  become part of products: either orders the read before the next copy.
- A loop must not begin with what was just loaded from HBM: under `jax.shard_map` that has another type than what any
  operation makes of it.
- Sums over the rows of a tile pass through a scratch of the block, so that two warpgroups must not make them at once.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import target
from pallas_kernels.varying import vary_alike

# The chips with `wgmma`, as their device kinds say.
CHIPS = ("H100", "H200", "H800", "H20", "GH200")
# Of an H100 and an H200.
MULTIPROCESSORS = 132
# Rows of a tile that one `wgmma` of a warpgroup takes.
ROWS = 64
# Of a block: threads of three would have fewer registers, 168 and not 255.
WARPGROUPS = 2
# Tiles in a ring, at the least: one is read while the other arrives.
STAGES = 2
# Of the host, for an interpreter: one waits for the block, one for a barrier, and one is what both wait for.
LEAST_THREADS = 3


def refuses_device() -> str | None:
    """Names the GPU that the program is for where it is none of `CHIPS`; what is no GPU can interpret."""
    platform, kind = target()
    if platform == "gpu" and not set(CHIPS) & set(kind.split()):
        return f"device kind {kind!r}; it is for Hopper: {', '.join(CHIPS)}"
    return None


# Tiles.


def products(*pairs) -> list:
    """x · y of each pair of tiles in shared memory, in registers and float32."""

    def multiply(*sums):
        for total, (x, y) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, x, y)
        return [total[...] for total in sums]

    shapes = [(x.shape[0], y.shape[1]) for x, y in pairs]
    return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def product(x, y):
    """x · y of two tiles in shared memory, in registers and float32."""
    return products((x, y))[0]


def add_products(sums, pairs, interpret) -> list:
    """sums + x · y, in registers and float32, for each of `pairs`: functions that return x, in registers, and y, in
    shared memory. Each is called when the products before it are begun, and may compute x meanwhile.
    """

    def multiply(totals):
        for total, pair in zip(totals, pairs, strict=True):
            x, y = pair()
            plgpu.wgmma(total, x.astype(y.dtype), y)

    if interpret is None:
        return pl.run_state(multiply)([plgpu.ACC.init(x) for x in sums])
    # The interpreter knows neither sums that do not begin at 0 nor products of what is in registers.
    added = []
    for total, pair in zip(sums, pairs, strict=True):
        x, y = pair()
        added.append(total + jnp.dot(x.astype(y.dtype), y[...], preferred_element_type=jnp.float32))
    plgpu.commit_smem()
    return added


def add_product(sums, x, y, interpret):
    """sums + x · y, in registers and float32, of x in registers and y in shared memory."""
    return add_products([sums], [lambda: (x, y)], interpret)[0]


def along(vector, shape, axis: int):
    """A vector along `axis` of a tile, the same over the other."""
    return jax.lax.broadcast_in_dim(vector, shape, [axis])


def load_vector(ref, axis: int):
    """Vector in HBM or shared memory -> registers, as the entries along `axis` of a tile lie there."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def zeros(*shape):
    """Sums of a tile, or of its rows, in float32."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


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


# Warpgroups.


def call(
    kernel,
    arguments,
    *,
    out,
    grid: dict[str, int],
    interpret,
    name: str,
    scratch=(),
    has_warpgroups: bool = True,
    has_barriers: bool = True,
):
    """Runs `kernel(*references)` over the grid.

    Args:
        kernel: takes references to the arguments, to the outputs and to the scratch.
        arguments: arrays.
        out: (shape, dtype) of each output.
        grid: sizes of the axes by name; the hardware counts the last one fastest.
        interpret: None to compile, or a `plgpu.InterpretGPUParams`.
        name: name of the kernel.
        scratch: a sequence of types.
        has_warpgroups: a block is `WARPGROUPS`, by the axis "warpgroup"; else it is one.
        has_barriers: the compiler puts a barrier around every store; else what warps exchange through shared memory is
            ordered by `plgpu.commit_smem` alone.
    """
    threads = {"num_threads": WARPGROUPS, "thread_name": "warpgroup"} if has_warpgroups else {}
    results = plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=not has_barriers
        ),
        interpret=interpret,
        kernel_name=name,
        **threads,
    )(*arguments)
    # Pallas does not say over which mesh axes they vary.
    return vary_alike((results, arguments))[0]


def interpreter(interpret):
    """`interpret` as `call` takes it, from False, True or a `plgpu.InterpretGPUParams`.

    Raises:
        ValueError: where the interpreter would wait for ever, since every thread of XLA waits in it.
    """
    if interpret is False:
        return None
    if (threads := _host_threads()) < LEAST_THREADS:
        raise ValueError(
            f"XLA has {threads} threads on this host; the interpreter of GPU kernels needs {LEAST_THREADS}: "
            f"set NPROC={LEAST_THREADS} in the environment before JAX starts"
        )
    return plgpu.InterpretGPUParams() if interpret is True else interpret


def _host_threads() -> int:
    """Threads of XLA's programs on CPU: by the environment, else one a core, and at least one a device."""
    named = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC")
    # Of the cores, those that this process may use, where the system tells.
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return max(int(named) if named else len(usable), jax.local_device_count("cpu"))


class Ring(NamedTuple):
    """Room in shared memory for tiles on their way from HBM.

    Attributes:
        buffers: of [stages, ...] each; a tile is a piece of each.
        filled: barriers [stages], which complete when all pieces of the tile have arrived.
        freed: barriers [stages], which complete when every warpgroup has done with the tile.
    """

    buffers: tuple
    filled: Any
    freed: Any

    @property
    def stages(self) -> int:
        return self.buffers[0].shape[0]

    def start(self, num_tiles, pieces, places=None) -> "Tiles":
        """Begins to copy `pieces(i)`, references to HBM, of the tiles i; to be run by every warpgroup.

        `places` are where the pieces go, parts of the buffers; None: each piece is that of a buffer.
        """
        tiles = Tiles(self, num_tiles, pieces, self.buffers if places is None else places)

        @pl.when(tiles.copies)
        def _():
            pl.loop(0, jnp.minimum(self.stages, num_tiles))(tiles.copy)

        return tiles


class Tiles(NamedTuple):
    """What passes through a ring.

    Attributes:
        ring: the ring.
        count: of tiles.
        pieces: as `Ring.start` takes it.
        places: likewise.
    """

    ring: Ring
    count: Any
    pieces: Callable[[Any], Iterable]
    places: Sequence

    def slot(self, i):
        """Where in the ring tile i is."""
        return jax.lax.rem(i, self.ring.stages)

    @property
    def copies(self):
        """Whether it is this warpgroup that starts the copies."""
        return jax.lax.axis_index("warpgroup") == 0

    def copy(self, i) -> None:
        """Starts to copy tile i to its place, which has to be free."""
        slot = self.slot(i)
        for piece, place in zip(self.pieces(i), self.places, strict=True):
            plgpu.copy_gmem_to_smem(piece, place.at[slot], self.ring.filled.at[slot])

    def fold(self, function, carry, last=None):
        """`carry = function(i, pieces, carry)` for every tile i; to be run by every warpgroup.

        `last`: what the last tile, which there has to be, is given to instead.
        """
        if last is None:
            return jax.lax.fori_loop(0, self.count, functools.partial(self._step, function), carry)
        stop = self.count - 1
        carry = jax.lax.fori_loop(0, stop, functools.partial(self._step, function), carry)
        return self._step(last, stop, carry)

    def _step(self, function, i, carry):
        slot = self.slot(i)
        next_tile = i - 1 + self.ring.stages

        @pl.when(self.copies & (i > 0) & (next_tile < self.count))
        def _():
            plgpu.barrier_wait(self.ring.freed.at[self.slot(next_tile)])
            self.copy(next_tile)

        plgpu.barrier_wait(self.ring.filled.at[slot])
        carry = function(i, [buffer.at[slot] for buffer in self.ring.buffers], carry)

        # Nobody waits for the last tiles to be freed.
        @pl.when(i + self.ring.stages < self.count)
        def _():
            plgpu.barrier_arrive(self.ring.freed.at[slot])

        return carry


def ring(*pieces, stages: int = STAGES) -> Ring:
    """Scratch for a ring of `stages` tiles that consist of `pieces`, (shape, dtype) each."""
    return Ring(
        tuple(plgpu.SMEM((stages, *shape), dtype) for shape, dtype in pieces),
        plgpu.Barrier(num_arrivals=len(pieces), num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )
