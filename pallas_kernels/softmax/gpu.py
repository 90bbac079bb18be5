"""Softmax and cross-entropy for NVIDIA Hopper (Pallas, Mosaic GPU): one read of the logits makes the sum.

A warp has a row. It adds tiles of columns as numbers with an exponent apart (`extended`; arXiv 2001.04438, algorithm
3): the largest logit of a tile and its sum are a few shuffles, no pass looks for the maximum and no warp waits for
another. Memory is the bottleneck, and nothing but wide loads, many at a time, goes between it and the registers. The
second pass of the softmax finds rows that are not too long in the caches.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.softmax import extended, gpu_rows, xla
from pallas_kernels.softmax.extended import Extended
from pallas_kernels.softmax.gpu_rows import load_tile, load_vector, store
from pallas_kernels.varying import vary_alike


def refuses(x, labels=None) -> str | None:
    """What the kernels cannot do with these arguments or on this GPU, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {x.dtype}; the kernels take float32 and bfloat16"
    return hopper.refuses_device()


def softmax(x, *, interpret=False):
    """Over the last axis. `interpret`: True or a `plgpu.InterpretGPUParams` to run without a GPU."""
    rows = _softmax(hopper.interpreter(interpret), gpu_rows.pad(x.reshape(-1, x.shape[-1])))
    return rows[: x.size // x.shape[-1], : x.shape[-1]].reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(interpret, x):
    (y,) = gpu_rows.call(
        _softmax_kernel, (x,), out=[(x.shape, x.dtype)], interpret=interpret, name="softmax"
    )
    return y


def _softmax_forward(interpret, x):
    y = _softmax(interpret, x)
    return y, y


def _softmax_backward(interpret, y, dy):
    return gpu_rows.call(
        _softmax_gradient_kernel,
        (y, dy),
        out=[(y.shape, y.dtype)],
        interpret=interpret,
        name="softmax_gradient",
    )


_softmax.defvjp(_softmax_forward, _softmax_backward)


def cross_entropy(logits, labels, *, interpret=False):
    """Returns `(loss [...], lse [...])`; see the package for the arguments, `softmax` for `interpret`."""
    logits, labels = vary_alike((logits, labels))
    # A label past the last column must not find one that fills up a tile.
    inside = jnp.where(labels < logits.shape[-1], labels, -1)
    rows = gpu_rows.pad(logits.reshape(-1, logits.shape[-1]))
    flat_labels = jnp.pad(inside.reshape(-1), (0, len(rows) - labels.size))
    outputs = _cross_entropy(hopper.interpreter(interpret), rows, flat_labels)
    return tuple(x[: labels.size].reshape(labels.shape) for x in outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(interpret, logits, labels):
    """Of logits [N, V] and labels [N]."""
    return _cross_entropy_forward(interpret, logits, labels)[0]


def _cross_entropy_forward(interpret, logits, labels):
    of_row = (labels.shape, jnp.float32)
    total = Extended(
        *gpu_rows.call(
            _total_kernel, (logits,), out=[of_row] * 2, interpret=interpret, name="cross_entropy"
        )
    )
    # One logit a row is left to a gather of XLA.
    outputs = xla.loss_and_lse(total, xla.logits_of(labels, logits))
    return outputs, (logits, labels, total)


def _cross_entropy_backward(interpret, saved, cotangents):
    logits, labels, total = saved
    d_loss, d_lse = cotangents
    factor = (d_loss + d_lse) / total.mantissa
    (d_logits,) = gpu_rows.call(
        _cross_entropy_gradient_kernel,
        (logits, labels, total.exponent, factor, d_loss),
        out=[(logits.shape, logits.dtype)],
        interpret=interpret,
        name="cross_entropy_gradient",
    )
    return d_logits, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


# Kernels, each for the rows `rows`, one a warp, of [N, V].


def _total(tiles, rows, x) -> Extended:
    """Σ e^x of the rows."""

    def add(columns, fresh, total):
        tile = gpu_rows.where_fresh(tiles, fresh, load_tile(tiles, x.at[rows, columns]), -jnp.inf)
        return Extended(*extended.add(total, extended.sum_of_exponentials(tile)))

    return tiles.fold(add, extended.zero(gpu_rows.zeros(tiles)))


def _total_kernel(tiles, rows, x, mantissas, exponents):
    total = _total(tiles, rows, x)
    store(mantissas.at[rows], total.mantissa)
    store(exponents.at[rows], total.exponent)


def _softmax_kernel(tiles, rows, x, y):
    total = _total(tiles, rows, x)

    def write(columns, _, carry):
        store(y.at[rows, columns], extended.over(load_tile(tiles, x.at[rows, columns]), total))
        return carry

    tiles.fold(write, None)


def _softmax_gradient_kernel(tiles, rows, y, dy, dx):
    """y (dy - Σ y dy / Σ y), as in `xla`."""

    def load(columns):
        return (load_tile(tiles, x.at[rows, columns]) for x in (y, dy))

    def add(columns, fresh, sums):
        out, d_out = load(columns)
        out = gpu_rows.where_fresh(tiles, fresh, out, 0)
        products, total = sums
        return products + jnp.sum(out * d_out, axis=1), total + jnp.sum(out, axis=1)

    nothing = gpu_rows.zeros(tiles)
    products, total = tiles.fold(add, (nothing, nothing))
    mean = products / total

    def write(columns, _, carry):
        out, d_out = load(columns)
        store(dx.at[rows, columns], out * (d_out - gpu_rows.along_columns(mean, out.shape)))
        return carry

    tiles.fold(write, None)


def _cross_entropy_gradient_kernel(
    tiles, rows, logits, labels, exponents, factors, d_losses, d_logits
):
    """p (d_loss + d_lse) - d_loss at the label; `factors` are (d_loss + d_lse) / mantissa."""
    label, exponent, factor, d_loss = (
        load_vector(tiles, x.at[rows]) for x in (labels, exponents, factors, d_losses)
    )

    def write(columns, _, carry):
        x = load_tile(tiles, logits.at[rows, columns])

        def spread(vector):
            return gpu_rows.along_columns(vector, x.shape)

        is_label = gpu_rows.column_numbers(tiles) == spread(label - columns.start)
        gradient = jnp.exp(x - spread(exponent)) * spread(factor)
        store(d_logits.at[rows, columns], gradient - jnp.where(is_label, spread(d_loss), 0))
        return carry

    tiles.fold(write, None)
