"""The state-space-duality scan on TPU (Pallas, Mosaic): chunks on the matrix unit, the state in VMEM between them.

Here are layout, grid and the custom VJP; `tpu_forward` and `tpu_backward` have the kernels, `tpu_chunk` what they
share, `tpu_blocks` the sizes. For the backward, and only then, the forward keeps the state before each chunk in the
dtype in which the matrix unit takes it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target
from pallas_kernels.ssd_scan import tpu_backward, tpu_forward
from pallas_kernels.ssd_scan.tpu_blocks import MAX_CHUNK, TILE, VMEM_BYTES, blocks, vmem_bytes
from pallas_kernels.ssd_scan.tpu_chunk import Spec
from pallas_kernels.varying import interpreter, shaped_like

LOG2_E = 1.4426950408889634


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
    up tokens, heads and P to whole blocks: with dt = 0 a state stays as it is.
    """
    (batch, time, heads, dim), (groups, states) = x.shape, B.shape[2:]
    sizes = _blocks(x, B, chunk_size)
    more_time, more_dim = -time % sizes.chunk, sizes.dim - dim

    def pad_heads(array, axis):
        """H -> G x heads a group, filled up."""
        shape = (*array.shape[:axis], groups, heads // groups, *array.shape[axis + 1 :])
        padding = [(0, 0)] * len(shape)
        padding[axis + 1] = (0, sizes.per_group - heads // groups)
        return jnp.pad(array.reshape(shape), padding)

    def in_rows(array):
        """[B, T, H] -> [B, steps, heads, T] with `steps` of all groups."""
        array = jnp.pad(pad_heads(array, 2), ((0, 0), (0, more_time), (0, 0), (0, 0)))
        return jnp.moveaxis(array, 1, -1).reshape(batch, -1, sizes.heads, time + more_time)

    def by_group(array):
        """[B, T, G, N] -> [B, G, T, N]."""
        return jnp.pad(array, ((0, 0), (0, more_time), (0, 0), (0, 0))).swapaxes(1, 2)

    dt = dt.astype(jnp.float32)
    padded = jnp.pad(x, ((0, 0), (0, more_time), (0, 0), (0, more_dim)))
    padded = pad_heads(padded, 2).reshape(batch, time + more_time, -1)
    past = jnp.pad(state, ((0, 0), (0, 0), (0, more_dim), (0, 0)))
    past = pad_heads(past, 1).reshape(batch, -1, states)
    skip = None if D is None else pad_heads(D, 0).reshape(-1, sizes.heads)
    y, last = _scan(
        Spec(sizes, interpreter(interpret, x)),
        padded,
        in_rows(dt),
        in_rows(dt * A),
        by_group(B),
        by_group(C),
        skip,
        None if reset is None else segment_rows(reset, sizes.chunk),
        past,
    )
    y = y.reshape(batch, -1, groups, sizes.per_group, sizes.dim)
    y = y[:, :time, :, : heads // groups, :dim].reshape(x.shape)
    last = last.reshape(batch, groups, sizes.per_group, sizes.dim, states)
    return y, last[:, :, : heads // groups, :dim].reshape(state.shape)


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


def _sums(x, size: int, *, reverse: bool = False):
    """Sums along the last axis from the beginning, or with `reverse` the end, of each `size` tokens.

    By a product with ones: XLA's own cumulative sum takes more cycles on TPU than the kernels around it.
    """
    ones = jnp.ones((size, size), x.dtype)
    ones = jnp.tril(ones) if reverse else jnp.triu(ones)
    by_size = x.reshape(*x.shape[:-1], -1, size)
    return jnp.einsum("...s,st->...t", by_size, ones, precision="highest").reshape(x.shape)


def segment_rows(reset, chunk: int):
    """What the kernels know of segments, each a row that they multiply with: bool [B, T] -> float32 [B, 4, T].

    The rows: the number of a token's segment in its chunk; whether it is that of the state before the chunk; whether
    it is that of the state after; whether these two are the same.
    """
    reset = jnp.pad(reset, ((0, 0), (0, -reset.shape[1] % chunk)))
    segment = jnp.cumsum(reset.reshape(reset.shape[0], -1, chunk), axis=-1)
    last = segment[..., -1:]
    rows = (segment, segment == 0, segment == last, jnp.broadcast_to(last == 0, segment.shape))
    return jnp.stack([x.reshape(reset.shape) for x in rows], axis=1).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(spec, x, dt, log_decay, B, C, D, rows, state):
    """In the kernels' layout: x [B, T, channels], dt and log_decay = dt A [B, steps, heads, T], B and C [B, G, T, N],
    D [steps, heads], rows [B, 4, T], the state [B, channels, N]."""
    y, last, _ = _call_forward(spec, x, dt, log_decay, B, C, D, rows, state, keeps_pasts=False)
    return y, last


def _forward(spec, x, dt, log_decay, B, C, D, rows, state):
    y, last, pasts = _call_forward(spec, x, dt, log_decay, B, C, D, rows, state, keeps_pasts=True)
    return (y, last), (x, dt, log_decay, B, C, D, rows, pasts)


def _call_forward(spec, x, dt, log_decay, B, C, D, rows, state, *, keeps_pasts):
    grid = _Grid(spec, x, B, reverse=False)
    pasts = shaped_like(x, (x.shape[0], grid.chunks, *state.shape[1:]), x.dtype)
    return grid.call(
        tpu_forward.kernel,
        [
            (x, grid.tokens),
            (dt, grid.heads),
            (_totals(log_decay), grid.heads),
            (B, grid.states),
            (C, grid.states),
            (_spread(D, spec), grid.skip),
            (rows, grid.rows),
            (state, grid.first_state),
        ],
        [
            (x, grid.tokens),
            (shaped_like(x, state.shape, jnp.float32), grid.last_state),
            (pasts if keeps_pasts else None, grid.pasts),
        ],
        grid.square_scratch(1),
    )


def _backward(spec, saved, cotangents):
    x, dt, log_decay, B, C, D, rows, pasts = saved
    d_y, d_last = cotangents
    grid = _Grid(spec, x, B, reverse=True)
    sums = pltpu.VMEM((spec.blocks.chunk, B.shape[3]), jnp.float32)
    d_x, d_dt, d_total, d_B, d_C, d_D, d_state = grid.call(
        tpu_backward.kernel,
        [
            (x, grid.tokens),
            (dt, grid.heads),
            (_totals(log_decay), grid.heads),
            (B, grid.states),
            (C, grid.states),
            (_spread(D, spec), grid.skip),
            (rows, grid.rows),
            (pasts, grid.pasts),
            (d_y, grid.tokens),
            (d_last, grid.first_state),
        ],
        [
            (x, grid.tokens),
            (dt, grid.heads),
            (log_decay, grid.heads),
            (B, grid.states),
            (C, grid.states),
            (None if D is None else dt, grid.heads),
            (d_last, grid.last_state),
        ],
        [*grid.square_scratch(2), sums, sums],
    )
    d_D = None if D is None else d_D.sum(axis=(0, 3))
    d_rows = None if rows is None else jnp.zeros_like(rows)
    d_log_decay = _sums(d_total, spec.blocks.chunk, reverse=True)
    return d_x, d_dt, d_log_decay, d_B, d_C, d_D, d_rows, d_state


_scan.defvjp(_forward, _backward)


def _totals(log_decay):
    """What the kernels exponentiate to base 2, summed from the beginning of each tile."""
    return _sums(log_decay * LOG2_E, TILE)


def _spread(D, spec):
    """[steps, heads] -> [steps, heads, Q]: rows as the kernels multiply with."""
    return None if D is None else jnp.broadcast_to(D[..., None], (*D.shape, spec.blocks.chunk))


class _Grid:
    """The grid batch x groups x chunks x steps of heads, and the blocks that its steps take.

    The states before the first and after the last chunk are fetched and stored at the first and last chunk only: where
    the index of a block stays, nothing moves.
    """

    def __init__(self, spec: Spec, x, B, *, reverse: bool):
        self.spec, sizes = spec, spec.blocks
        (batch, groups, time, states) = B.shape
        self.chunks, self.num_states = time // sizes.chunk, states
        self.grid = (batch, groups, self.chunks, sizes.steps)
        last, steps = self.chunks - 1, sizes.steps

        def chunk(c):
            return last - c if reverse else c

        state = (None, sizes.channels, states)
        self.tokens = pl.BlockSpec(
            (None, sizes.chunk, sizes.channels), lambda b, g, c, j: (b, chunk(c), g * steps + j)
        )
        self.heads = pl.BlockSpec(
            (None, None, sizes.heads, sizes.chunk),
            lambda b, g, c, j: (b, g * steps + j, 0, chunk(c)),
        )
        self.states = pl.BlockSpec(
            (None, None, sizes.chunk, states), lambda b, g, c, j: (b, g, chunk(c), 0)
        )
        self.skip = pl.BlockSpec(
            (None, sizes.heads, sizes.chunk), lambda b, g, c, j: (g * steps + j, 0, 0)
        )
        self.rows = pl.BlockSpec((None, 4, sizes.chunk), lambda b, g, c, j: (b, 0, chunk(c)))
        self.pasts = pl.BlockSpec(
            (None, *state), lambda b, g, c, j: (b, chunk(c), g * steps + j, 0)
        )
        self.first_state = pl.BlockSpec(
            state, lambda b, g, c, j: (b, g * steps + jnp.where(c == 0, j, steps - 1), 0)
        )
        self.last_state = pl.BlockSpec(
            state, lambda b, g, c, j: (b, g * steps + jnp.where(c == last, j, 0), 0)
        )

    def square_scratch(self, count: int) -> list:
        """`count` arrays over pairs of the tokens of a chunk."""
        return [pltpu.VMEM((self.spec.blocks.chunk,) * 2, jnp.float32)] * count

    def call(self, kernel, inputs, outputs, scratch):
        """Runs `kernel` on `inputs`, pairs of an array and its blocks; `outputs` are pairs of what it is like and its
        blocks; None for an array that there is not. `scratch` is beside that for the state that travels."""
        sizes, x = self.spec.blocks, inputs[0][0]
        carry = pltpu.VMEM((sizes.steps, sizes.channels, self.num_states), jnp.float32)
        return pl.pallas_call(
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
            ),
            interpret=self.spec.interpret,
            name="ssd_scan_" + kernel.__module__.rsplit("_", 1)[1],
        )(*(array for array, _ in inputs))
