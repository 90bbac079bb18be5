"""The state-space-duality scan for NVIDIA Hopper (Pallas, Mosaic GPU): layout and the custom VJP around the kernels.

Dao and Gu, arXiv 2405.21060, section 6, in two kernels. The first walks the chunks, a block for each head with its
state in registers, and leaves the state before each chunk in bfloat16: at N = 128 as many bytes as x has. The second
takes all chunks at once, and the heads of a group share B and C in it.

One kernel that walks the chunks and computes the outputs as well would move x and y only, but it has a block for each
head and row of the batch: Mamba-2 of 130M parameters with 2 rows of the batch has 48 for 132 multiprocessors, each of
which would wait for one product after the other along all of time. Only the recurrence itself is walked here. The
backward needs the states anyway; it walks the same recurrence from the last chunk to the first (`gpu_states`), for the
gradient of the state after each chunk, and then has all chunks at once again (`gpu_gradients`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.residuals import keep
from pallas_kernels.ssd_scan import gpu_gradients, gpu_outputs, gpu_states
from pallas_kernels.ssd_scan.gpu_chunk import CHANNELS, CHUNK, LOG2_E, STATES
from pallas_kernels.ssd_scan.state import state_or_zeros
from pallas_kernels.varying import vary_alike


def refuses(x, dt, A, B, C, D, reset, state, *, chunk_size) -> str | None:
    """What the kernels cannot do with these arguments or on this GPU, or None."""
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}; the kernels take bfloat16"
    if dt.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dt has dtype {dt.dtype}; the kernels take bfloat16 and float32"
    if B.shape[3] > STATES:
        return f"B has N = {B.shape[3]}; the kernels take up to {STATES}"
    if chunk_size is not None and chunk_size > CHUNK:
        return f"chunk_size={chunk_size}; the kernels take up to {CHUNK} tokens a chunk"
    return hopper.refuses_device()


def ssd_scan(x, dt, A, B, C, D, reset, state, *, chunk_size, interpret=False):
    """Returns `(y [B, T, H, P], state [B, H, P, N])`; see the package for the arguments.

    A chunk is of 128 tokens, to which `chunk_size` is rounded up. Zeros fill up tokens, P and N to whole tiles: with
    dt = 0 a state stays as it is. `interpret`: True or a `plgpu.InterpretGPUParams` to run without a GPU. The
    interpreter has side effects, with which JAX refuses `jax.checkpoint` and `jax.shard_map`; compiled kernels have
    none.
    """
    del chunk_size
    state = state_or_zeros(state, x, A, B)
    batch, time, _, dim = x.shape
    more_time, more_dim = -time % CHUNK, -dim % CHANNELS
    more_states = STATES - B.shape[3]
    tokens = (0, 0), (0, more_time), (0, 0)

    def in_rows(array):
        """[B, T, H] -> [B, H, T]."""
        return jnp.pad(array, tokens).swapaxes(1, 2)

    dt = dt.astype(jnp.float32)
    past = jnp.pad(state, ((0, 0), (0, 0), (0, more_dim), (0, more_states)))
    padded = jnp.pad(x, (*tokens, (0, more_dim)))
    padded_B, padded_C = (jnp.pad(array, (*tokens, (0, more_states))) for array in (B, C))
    y, last = _scan(
        hopper.interpreter(interpret),
        *vary_alike(
            (
                padded.reshape(batch, time + more_time, -1, CHANNELS),
                in_rows(dt),
                in_rows(dt * A),
                padded_B,
                padded_C,
                D,
                None if reset is None else jnp.pad(reset, tokens[:2]),
                past.reshape(batch, -1, CHANNELS, STATES),
            )
        ),
    )
    y = y.reshape(padded.shape)[:, :time, :, :dim]
    return y, last.reshape(past.shape)[:, :, :dim, : state.shape[3]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret, x, dt, log_decay, B, C, D, reset, state):
    """In the kernels' layout: x [B, T, tiles, CHANNELS], dt and log_decay = dt A [B, H, T], B and C [B, T, G, STATES],
    D [H], reset [B, T], the state [B, tiles, CHANNELS, STATES]."""
    return _forward(interpret, x, dt, log_decay, B, C, D, reset, state)[0]


def _forward(interpret, x, dt, log_decay, B, C, D, reset, state):
    scales, (begins, _) = _scales(log_decay, reset), _bounds(reset)
    pasts, last = gpu_states.states(
        x,
        B,
        jnp.stack([dt * scales.to_end, scales.kept], axis=2),
        state,
        reverse=False,
        interpret=interpret,
        name="ssd_scan_states",
    )
    y = gpu_outputs.outputs(
        x,
        B,
        C,
        _stack(scales.total, dt, scales.from_past, D),
        begins,
        pasts,
        interpret=interpret,
    )
    y, pasts = keep(y, pasts)
    return (y, last), (x, dt, log_decay, B, C, D, reset, pasts)


def _backward(interpret, saved, cotangents):
    x, dt, log_decay, B, C, D, reset, pasts = saved
    d_y, d_last = cotangents
    scales, (begins, ends) = _scales(log_decay, reset), _bounds(reset)
    adjoints, d_state = gpu_states.states(
        d_y,
        C,
        jnp.stack([scales.from_past, scales.kept], axis=2),
        d_last,
        reverse=True,
        interpret=interpret,
        name="ssd_scan_states_gradients",
    )
    read, d_C = gpu_gradients.of_reading(
        x,
        d_y,
        B,
        C,
        _stack(scales.total, dt, scales.from_past),
        begins,
        pasts,
        adjoints,
        interpret=interpret,
    )
    written, d_x, d_B = gpu_gradients.of_writing(
        x,
        d_y,
        B,
        C,
        _stack(scales.total, dt, scales.to_end, D),
        ends,
        adjoints,
        interpret=interpret,
    )
    heads = dt.shape[1]
    within_read, past_read, kept = _by_head(read, heads)
    within_written, at_end, *skipped = _by_head(written, heads)
    d_dt = within_written + scales.to_end * at_end
    d_total = within_read + scales.from_past * past_read - dt * d_dt
    d_end = _by_chunk(dt * scales.to_end * at_end + scales.kept * kept)
    d_log_decay = _by_chunk(d_total)
    d_log_decay = jax.lax.cumsum(d_log_decay, axis=3, reverse=True)
    d_log_decay = (d_log_decay + d_end.sum(axis=3, keepdims=True)).reshape(dt.shape)
    d_D = None if D is None else skipped[0].sum(axis=(0, 2))
    return d_x, d_dt, d_log_decay, d_B, d_C, d_D, None, d_state


_scan.defvjp(_forward, _backward)


class Scales(NamedTuple):
    """What a chunk multiplies with, float32 [B, H, T].

    Attributes:
        total: the sum of dt A / ln 2 from the beginning of the chunk.
        from_past: what is left of the state before the chunk when a token reads it.
        to_end: what is left at the end of the chunk of what a token writes.
        kept: what is left at the end of the chunk of the state before it, the same for all of its tokens.
    """

    total: jax.Array
    from_past: jax.Array
    to_end: jax.Array
    kept: jax.Array


def _scales(log_decay, reset) -> Scales:
    total = jnp.cumsum(_by_chunk(log_decay * LOG2_E), axis=3)
    last = total[..., -1:]
    from_past, to_end, kept = jnp.exp2(total), jnp.exp2(last - total), jnp.exp2(last)
    if reset is not None:
        segment = jnp.cumsum(_by_chunk(reset), axis=2)[:, None]
        last = segment[..., -1:]
        from_past = jnp.where(segment == 0, from_past, 0)
        to_end = jnp.where(segment == last, to_end, 0)
        kept = jnp.where(last == 0, kept, 0)
    kept = jnp.broadcast_to(kept, total.shape)
    return Scales(*(array.reshape(log_decay.shape) for array in (total, from_past, to_end, kept)))


def _bounds(reset) -> tuple:
    """Of each token the first of its chunk that it reads, and the last that reads it: int32 [B, T], or None for one
    segment."""
    if reset is None:
        return None, None
    is_first = _by_chunk(reset)
    index = jnp.arange(CHUNK)
    begin = jax.lax.cummax(jnp.where(is_first, index, 0), axis=2)
    following = jnp.where(is_first, index, CHUNK)[..., 1:]
    following = jnp.pad(following, ((0, 0), (0, 0), (0, 1)), constant_values=CHUNK)
    end = jax.lax.cummin(following, axis=2, reverse=True) - 1
    return tuple(array.astype(jnp.int32).reshape(reset.shape) for array in (begin, end))


def _stack(*rows) -> jax.Array:
    """Arrays [B, H, T] or [H], of which one may be None -> [B, H, rows, T]."""
    shape = rows[0].shape
    rows = [row[:, None] if row.ndim == 1 else row for row in rows if row is not None]
    return jnp.stack([jnp.broadcast_to(row, shape) for row in rows], axis=2)


def _by_chunk(array):
    """[..., T] -> [..., chunks, CHUNK]."""
    return array.reshape(*array.shape[:-1], -1, CHUNK)


def _by_head(rows, heads: int):
    """[B, tiles, rows, T] -> `rows` times [B, H, T], summed over the tiles of a head."""
    batch, tiles, count, time = rows.shape
    rows = rows.reshape(batch, heads, tiles // heads, count, time).sum(axis=2)
    return [rows[:, :, row] for row in range(count)]
