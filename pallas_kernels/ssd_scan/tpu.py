"""The state-space-duality scan on TPU (Pallas, Mosaic): chunks on the matrix unit, the state in VMEM between them.

Here are layout, grid and the custom VJP; `tpu_forward` and `tpu_backward` have the kernels, `tpu_chunk` what they
share, `tpu_blocks` the sizes. For the backward, and only then, the forward keeps the state before each tile, in the
dtype in which the matrix unit takes it: N over the tokens of a tile times the size of x, instead of a second walk
through the chunk; and the running sums of dt A, of the size of dt, instead of a product that all others wait for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cotangents import array_or_none, as_array, values
from pallas_kernels.dispatch import target
from pallas_kernels.residuals import keep
from pallas_kernels.ssd_scan import tpu_backward, tpu_forward
from pallas_kernels.ssd_scan.tpu_blocks import (
    LANES,
    MAX_CHUNK,
    ROWS,
    VMEM_BYTES,
    Blocks,
    blocks,
    vmem_bytes,
)
from pallas_kernels.ssd_scan.tpu_chunk import Spec
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import interpreter, shaped_like


def refuses(x, dt, A, B, C, D, reset, state, *, chunk_size) -> str | None:
    """What the kernels cannot do with these arguments, or None."""
    for name, array in (("x", x), ("dt", dt)):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} has dtype {array.dtype}; the kernels take bfloat16 and float32"
    sizes = _blocks(x, B, chunk_size)
    if sizes.chunk > MAX_CHUNK:
        return f"chunk_size={chunk_size}; the kernels take up to {MAX_CHUNK} tokens a chunk"
    if vmem_bytes(sizes, B.shape[3], x.dtype) > VMEM_BYTES:
        heads = x.shape[2] // B.shape[2]
        return (
            f"a state of {heads} heads x {x.shape[3]} x {B.shape[3]} a group does not fit into VMEM"
        )
    return None


def ssd_scan(x, dt, A, B, C, D, reset, state, *, chunk_size, interpret=False):
    """Returns `(y [B, T, H, P], state [B, H, P, N])`; see the package for the arguments.

    A chunk is a multiple of 128 tokens: `chunk_size` is rounded up. `interpret`: as `pallas_call` takes it. Zeros fill
    up tokens, heads, P and N to whole blocks: with dt = 0 a state stays as it is.
    """
    (batch, time, heads, dim), (groups, states) = x.shape, B.shape[2:]
    sizes = _blocks(x, B, chunk_size)
    more_time, more_dim, more_states = -time % sizes.chunk, sizes.dim - dim, -states % ROWS

    def pad_heads(array, axis):
        """H -> all heads of all groups, filled up."""
        shape = (*array.shape[:axis], groups, heads // groups, *array.shape[axis + 1 :])
        padding = [(0, 0)] * len(shape)
        padding[axis + 1] = (0, sizes.per_group - heads // groups)
        padded = jnp.pad(array.reshape(shape), padding)
        return padded.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])

    def in_rows(array):
        """[B, T, H] -> [B, steps of all groups, heads, T]."""
        array = jnp.pad(pad_heads(array, 2), ((0, 0), (0, more_time), (0, 0)))
        return jnp.moveaxis(array, 1, -1).reshape(batch, -1, sizes.heads, time + more_time)

    def by_group(array):
        """[B, T, G, N] -> [B, G, T, N], or `turned` [B, G, N, T]."""
        array = jnp.pad(array, ((0, 0), (0, more_time), (0, 0), (0, more_states)))
        return array.transpose(0, 2, 3, 1) if sizes.turned else array.swapaxes(1, 2)

    dt = dt.astype(jnp.float32)
    padded = jnp.pad(x, ((0, 0), (0, more_time), (0, 0), (0, more_dim)))
    padded = pad_heads(padded, 2).reshape(batch, time + more_time, -1)
    if state is not None:
        state = jnp.pad(state, ((0, 0), (0, 0), (0, more_dim), (0, more_states)))
        state = pad_heads(state, 1).transpose(0, 3, 1, 2)
        state = state.reshape(batch, states + more_states, -1)
    rates = pad_heads(A.astype(jnp.float32), 0).reshape(-1, 1, sizes.heads)
    skip = None if D is None else jnp.repeat(pad_heads(D, 0), sizes.dim)[None]
    y, last = _scan(
        Spec(sizes, state is not None, interpreter(interpret, x)),
        padded,
        in_rows(dt),
        rates,
        by_group(B),
        by_group(C),
        skip,
        None if reset is None else segment_marks(reset, sizes),
        state,
    )
    y = y.reshape(batch, -1, groups, sizes.per_group, sizes.dim)
    y = y[:, :time, :, : heads // groups, :dim].reshape(x.shape)
    last = last.reshape(batch, -1, groups, sizes.per_group, sizes.dim)
    last = last[:, :states, :, : heads // groups, :dim]
    return y, last.transpose(0, 2, 3, 4, 1).reshape(batch, heads, dim, states)


def _blocks(x, B, chunk_size):
    (_, time, heads, dim), (groups, states) = x.shape, B.shape[2:]
    return blocks(
        target().device_kind,
        time=time,
        per_group=heads // groups,
        dim=dim,
        states=states,
        dtype=x.dtype,
        chunk_size=chunk_size,
    )


def segment_marks(reset, sizes: Blocks):
    """What the kernels know of segments: bool [B, T] -> float32 [B, 4, T].

    The number of a token's segment in its tile; then what to add to the exponents of decays, 0 or -inf, for the state
    before the tile to a token of its segment, from a token to the state after, and for one state to the other.
    """
    reset = jnp.pad(reset, ((0, 0), (0, -reset.shape[1] % sizes.chunk)))
    number = jnp.cumsum(reset.reshape(reset.shape[0], -1, sizes.tile), axis=-1)
    last = number[..., -1:]
    reached = (number == 0, number == last, jnp.broadcast_to(last == 0, number.shape))
    marks = [number.astype(jnp.float32), *(jnp.where(x, 0.0, -jnp.inf) for x in reached)]
    return jnp.stack([x.reshape(reset.shape) for x in marks], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(spec, x, dt, A, B, C, D, marks, state):
    """In the kernels' layout: x [B, T, channels], dt [B, steps, heads, T], A [steps, 1, heads], B and C
    [B, G, T, N] or turned, D [1, channels], marks [B, 4, T], the state [B, N, channels]."""
    y, last, *_ = _call_forward(spec, x, dt, A, B, C, D, marks, state, keeps_pasts=False)
    return y, last


def _forward(spec, *arguments):
    arguments = values(arguments)
    y, last, *kept = _call_forward(spec, *arguments, keeps_pasts=True)
    y, last, pasts, totals = keep(y, last, *kept)
    return (y, last), (*arguments[:-1], totals, pasts, last)


def _call_forward(spec, x, dt, A, B, C, D, marks, state, *, keeps_pasts):
    grid, sizes = _Grid(spec, x, B, reverse=False), spec.blocks
    (batch, _, channels), tiles = x.shape, grid.chunks * sizes.tiles
    last = shaped_like(x, (batch, grid.num_states, channels), jnp.float32)
    pasts = shaped_like(x, (batch, tiles, grid.num_states, channels), x.dtype)
    return grid.call(
        tpu_forward.kernel,
        [
            (x, grid.tokens),
            (dt, grid.heads),
            (_over_lanes(A), grid.rates),
            (B, grid.states),
            (C, grid.states),
            (D, grid.skip),
            (marks, grid.marks),
            (state, grid.first_state),
        ],
        [
            (x, grid.tokens),
            (last, grid.last_state),
            (pasts if keeps_pasts else None, grid.pasts),
            (dt if keeps_pasts else None, grid.heads),
        ],
        [pltpu.VMEM((sizes.tile * x.dtype.itemsize // 4, sizes.pack_tokens), jnp.uint32)],
    )


def _backward(spec, saved, cotangents):
    x, dt, A, B, C, D, marks, totals, pasts, last = saved
    d_y, d_last = cotangents
    d_y, d_last = as_array(d_y, x), array_or_none(d_last)
    grid, sizes = _Grid(spec, x, B, reverse=True), spec.blocks
    of_skip = shaped_like(x, (x.shape[0], grid.chunks, 1, x.shape[2]), jnp.float32)
    of_rates = shaped_like(x, (x.shape[0], grid.chunks, *A.shape), jnp.float32)
    mask = pltpu.VMEM((sizes.tile, sizes.pack_tokens), jnp.float32)
    d_x, d_dt, d_A, d_B, d_C, d_D, d_state = grid.call(
        tpu_backward.kernel,
        [
            (x, grid.tokens),
            (dt, grid.heads),
            (_over_lanes(A), grid.rates),
            (totals, grid.heads),
            (B, grid.states),
            (C, grid.states),
            (D, grid.skip),
            (marks, grid.marks),
            (pasts, grid.pasts),
            (last, grid.first_state),
            (d_y, grid.tokens),
            (d_last, grid.first_state),
        ],
        [
            (x, grid.tokens),
            (dt, grid.heads),
            (of_rates, grid.rate_gradient),
            (B, grid.states),
            (C, grid.states),
            (None if D is None else of_skip, grid.skip_gradient),
            (last if spec.has_state else None, grid.last_state),
        ],
        [
            pltpu.VMEM((sizes.steps, grid.num_states, sizes.channels), x.dtype)
            if grid.chunks > 1
            else None,
            pltpu.VMEM((sizes.tiles, sizes.heads, LANES), jnp.float32),
            pltpu.VMEM((sizes.chunk // LANES, sizes.heads, LANES), jnp.float32),
            pltpu.VMEM((sizes.chunk // LANES, sizes.heads, LANES), jnp.float32),
            pltpu.VMEM(grid.states.block_shape[2:], jnp.float32),
            pltpu.VMEM((grid.num_states, sizes.chunk), jnp.float32),
            mask,
        ],
    )
    d_D = None if D is None else d_D.sum(axis=(0, 1))
    d_marks = None if marks is None else jnp.zeros_like(marks)
    return d_x, d_dt, d_A.sum(axis=(0, 1)), d_B, d_C, d_D, d_marks, d_state


def _over_lanes(A):
    """[steps, 1, heads] -> [steps, heads, 128], a rate in all lanes."""
    return jnp.broadcast_to(A.swapaxes(1, 2), (A.shape[0], A.shape[2], LANES))


_scan.defvjp(_forward, _backward, symbolic_zeros=True)


class _Grid:
    """The grid batch x groups x chunks x steps of heads, and the blocks that its steps take.

    The states before the first and after the last chunk are fetched and stored at the first and last chunk only: where
    the index of a block stays, nothing moves.
    """

    def __init__(self, spec: Spec, x, B, *, reverse: bool):
        self.spec, sizes = spec, spec.blocks
        (batch, time, channels), states = x.shape, B.shape[2 if sizes.turned else 3]
        groups = channels // (sizes.per_group * sizes.dim)
        self.chunks, self.num_states = time // sizes.chunk, states
        self.grid = (batch, groups, self.chunks, sizes.steps)
        last, steps = self.chunks - 1, sizes.steps

        def chunk(c):
            return last - c if reverse else c

        state = (None, states, sizes.channels)
        self.tokens = pl.BlockSpec(
            (None, sizes.chunk, sizes.channels), lambda b, g, c, j: (b, chunk(c), g * steps + j)
        )
        self.heads = pl.BlockSpec(
            (None, None, sizes.heads, sizes.chunk),
            lambda b, g, c, j: (b, g * steps + j, 0, chunk(c)),
        )
        self.states = (
            pl.BlockSpec((None, None, states, sizes.chunk), lambda b, g, c, j: (b, g, 0, chunk(c)))
            if sizes.turned
            else pl.BlockSpec(
                (None, None, sizes.chunk, states), lambda b, g, c, j: (b, g, chunk(c), 0)
            )
        )
        self.rates = pl.BlockSpec(
            (None, sizes.heads, LANES), lambda b, g, c, j: (g * steps + j, 0, 0)
        )
        self.rate_gradient = pl.BlockSpec(
            (None, None, None, 1, sizes.heads),
            lambda b, g, c, j: (b, chunk(c), g * steps + j, 0, 0),
        )
        self.skip = pl.BlockSpec((1, sizes.channels), lambda b, g, c, j: (0, g * steps + j))
        self.marks = pl.BlockSpec((None, 4, sizes.chunk), lambda b, g, c, j: (b, 0, chunk(c)))
        self.pasts = pl.BlockSpec(
            (None, sizes.tiles, *state[1:]), lambda b, g, c, j: (b, chunk(c), 0, g * steps + j)
        )
        self.skip_gradient = pl.BlockSpec(
            (None, None, 1, sizes.channels), lambda b, g, c, j: (b, chunk(c), 0, g * steps + j)
        )
        self.first_state = pl.BlockSpec(
            state, lambda b, g, c, j: (b, 0, g * steps + jnp.where(c == 0, j, steps - 1))
        )
        self.last_state = pl.BlockSpec(
            state, lambda b, g, c, j: (b, 0, g * steps + jnp.where(c == last, j, 0))
        )

    def call(self, kernel, inputs, outputs, scratch):
        """Runs `kernel` on `inputs`, pairs of an array and its blocks; `outputs` are pairs of what it is like and its
        blocks; None for an array that there is not. `scratch` is beside that for the state that travels."""
        sizes, x = self.spec.blocks, inputs[0][0]
        carry = pltpu.VMEM((sizes.steps, self.num_states, sizes.channels), jnp.float32)
        return tpu_call(
            functools.partial(kernel, self.spec),
            grid=self.grid,
            in_specs=tuple(None if array is None else block for array, block in inputs),
            out_specs=tuple(None if array is None else block for array, block in outputs),
            out_shape=tuple(
                None if array is None else shaped_like(x, array.shape, array.dtype)
                for array, _ in outputs
            ),
            scratch_shapes=(carry, *scratch),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
                # Of copies, whose blocks are those of this grid: what few steps begin and end with would wait for them.
                disable_bounds_checks=True,
            ),
            interpret=self.spec.interpret,
            name="ssd_scan_" + kernel.__module__.rsplit("_", 1)[1],
        )(*(array for array, _ in inputs))
