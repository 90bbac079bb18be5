"""Softmax and cross-entropy for TPU (Pallas, Mosaic): one read of the logits makes the sum, none the maximum.

Each of the 128 lanes keeps a sum m e^n of its own through all columns of a row; only the last step adds lanes up. In
`softmax` the grid goes over the columns twice, to sum and to write; where all columns of a row are one block, it stays
in VMEM in between. The gradient of the softmax does the same. That of the cross-entropy is elementwise, one fusion
of XLA, and is `xla.logits_gradient`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.softmax import xla
from pallas_kernels.softmax.extended import Extended
from pallas_kernels.softmax.tpu_blocks import LANES, ROWS, Blocks, one_pass_blocks, two_pass_blocks
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import interpreter, shaped_like, vary_alike

# Columns of 16 rows that are read into registers at once, with one exponent for each lane; of the cross-entropy, which
# looks for labels too, so many that none is spilled.
GROUP, LABELED_GROUP = 32 * LANES, 16 * LANES
LOWEST = float(jnp.finfo(jnp.float32).min)


class _Spec(NamedTuple):
    """The static arguments of a kernel. `columns`: V; `interpret`: as `pallas_call` takes it."""

    blocks: Blocks
    columns: int
    interpret: bool | pltpu.InterpretParams


def refuses(x, labels=None) -> str | None:
    """What the kernels cannot do."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {x.dtype}; the kernels take float32 and bfloat16"
    return None


def softmax(x, *, interpret=False):
    """Over the last axis."""
    rows = _softmax(interpret, _to_rows(x))
    return rows[: x.size // x.shape[-1]].reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(interpret, x):
    return _two_passes(_softmax_kernel, interpret, x)


def _softmax_forward(interpret, x):
    y = _softmax(interpret, x)
    return y, y


def _softmax_backward(interpret, y, dy):
    return (_two_passes(_softmax_gradient_kernel, interpret, y, dy),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def cross_entropy(logits, labels, *, interpret=False):
    """Returns `(loss [...], lse [...])`; see the package for the arguments."""
    logits, labels = vary_alike((logits, labels))
    outputs = _cross_entropy(interpret, _to_rows(logits), _to_rows(labels[..., None])[:, 0])
    return tuple(x[: labels.size].reshape(labels.shape) for x in outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(interpret, logits, labels):
    """Of logits [N, V] and labels [N]."""
    return _cross_entropy_forward(interpret, logits, labels)[0]


def _cross_entropy_forward(interpret, logits, labels):
    num_rows, num_columns = logits.shape
    sizes = one_pass_blocks(num_rows, num_columns, logits.dtype.itemsize)
    spec = _spec(interpret, logits, sizes)
    steps = _steps(num_rows, sizes.rows)
    # A label past the last column must not find one that fills up a block.
    labels_inside = jnp.where(labels < num_columns, labels, -1)
    # Values of a row lie along the lanes, as columns of one lane would take 128 times the memory.
    labels_by_step = jnp.pad(labels_inside, (0, steps * sizes.rows - num_rows))
    scratch = pltpu.VMEM((sizes.rows, LANES), jnp.float32)
    outputs = tpu_call(
        functools.partial(_cross_entropy_kernel, spec),
        grid=(steps, _steps(num_columns, sizes.columns)),
        in_specs=[
            pl.BlockSpec(sizes, lambda i, j: (i, j)),
            pl.BlockSpec((1, 1, sizes.rows), lambda i, j: (i, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, 3, sizes.rows), lambda i, j: (i, 0, 0)),
        out_shape=shaped_like(logits, (steps, 3, sizes.rows), jnp.float32),
        scratch_shapes=[scratch, scratch, scratch, pltpu.VMEM(scratch.shape, jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=spec.interpret,
        name="cross_entropy",
    )(logits, labels_by_step.reshape(steps, 1, -1))
    mantissa, exponent, label_logits = outputs.swapaxes(0, 1).reshape(3, -1)[:, :num_rows]
    total = Extended(mantissa, exponent)
    return xla.loss_and_lse(total, label_logits), (logits, labels, total)


def _cross_entropy_backward(interpret, saved, cotangents):
    logits, labels, total = saved
    return xla.logits_gradient(logits, labels, total, *cotangents), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _to_rows(x):
    """[..., V] -> [N, V], of at least the rows of one register: zeros fill up fewer."""
    x = x.reshape(-1, x.shape[-1])
    return jnp.pad(x, ((0, max(0, ROWS - x.shape[0])), (0, 0)))


def _two_passes(kernel, interpret, *arrays):
    """Runs `kernel` on arrays [N, V], on a grid of (blocks of rows, pass, blocks of columns); returns [N, V]."""
    num_rows, num_columns = arrays[0].shape
    bytes_per_entry = (len(arrays) + 1) * arrays[0].dtype.itemsize
    sizes = two_pass_blocks(num_rows, num_columns, bytes_per_entry)
    spec = _spec(interpret, arrays[0], sizes)
    return tpu_call(
        functools.partial(kernel, spec),
        grid=(_steps(num_rows, sizes.rows), 2, _steps(num_columns, sizes.columns)),
        in_specs=[pl.BlockSpec(sizes, lambda i, p, j: (i, j)) for _ in arrays],
        # The first pass writes nothing: its block of the output is the one that the second begins with.
        out_specs=pl.BlockSpec(sizes, lambda i, p, j: (i, p * j)),
        out_shape=shaped_like(arrays[0], arrays[0].shape, arrays[0].dtype),
        scratch_shapes=[pltpu.VMEM((sizes.rows, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=spec.interpret,
        name=kernel.__name__.strip("_"),
    )(*arrays)


def _softmax_kernel(spec, x, y, mantissas, exponents):
    """Refs [rows, columns] and scratch [rows, 128]: a sum in each lane, then 1 / m and n of the row in all lanes."""
    step, is_last = pl.program_id(2), pl.program_id(2) == pl.num_programs(2) - 1

    def add(rows, columns, lanes):
        return (
            *_add_exponentials(_masked(spec, step, columns, x[rows, columns], -jnp.inf), lanes),
        )

    def finish():
        total = _sum_of_lanes(mantissas, exponents)
        mantissas[...] = jnp.broadcast_to(1 / total.mantissa, mantissas.shape)
        exponents[...] = jnp.broadcast_to(total.exponent, exponents.shape)

    def write(rows, columns):
        factor, exponent = mantissas[rows], exponents[rows]
        out = [jnp.exp(x - exponent) * factor for x in _registers(x[rows, columns])]
        y[rows, columns] = jnp.concatenate(out, axis=1).astype(y.dtype)

    is_first_pass = pl.program_id(1) == 0

    @pl.when(is_first_pass)
    def _():
        _accumulate(step, is_last, x, add, [(mantissas, 0), (exponents, LOWEST)], finish)

    @pl.when(~is_first_pass)
    def _():
        _write(x, write)


def _softmax_gradient_kernel(spec, y, dy, dx, products, totals):
    """y (dy - Σ y dy / Σ y), as in `xla`; refs [rows, columns] and scratch [rows, 128]: a sum in each lane.

    After the first pass `products` has Σ y dy / Σ y of the row in all lanes.
    """
    step, is_last = pl.program_id(2), pl.program_id(2) == pl.num_programs(2) - 1

    def add(rows, columns, lanes):
        wide = _masked(spec, step, columns, y[rows, columns].astype(jnp.float32), 0)
        d_wide = _masked(spec, step, columns, dy[rows, columns].astype(jnp.float32), 0)
        return sum(_registers(wide * d_wide), lanes[0]), sum(_registers(wide), lanes[1])

    def finish():
        product, total = (x[...].sum(axis=1, keepdims=True) for x in (products, totals))
        products[...] = jnp.broadcast_to(product / total, products.shape)

    def write(rows, columns):
        mean = products[rows]
        pairs = zip(_registers(y[rows, columns]), _registers(dy[rows, columns]), strict=True)
        out = [y * (dy - mean) for y, dy in pairs]
        dx[rows, columns] = jnp.concatenate(out, axis=1).astype(dx.dtype)

    is_first_pass = pl.program_id(1) == 0

    @pl.when(is_first_pass)
    def _():
        _accumulate(step, is_last, y, add, [(products, 0), (totals, 0)], finish)

    @pl.when(~is_first_pass)
    def _():
        _write(y, write)


def _cross_entropy_kernel(
    spec, logits, labels, out, mantissas, exponents, label_logits, label_lanes
):
    """Refs logits [rows, columns], labels [1, 1, rows] and out [1, 3, rows]: m, n and the logit of the label.

    Scratch [rows, 128]: a sum in each lane; and, int32, the label less the number of the lane.
    """
    step, is_last = pl.program_id(1), pl.program_id(1) == pl.num_programs(1) - 1
    lane = jax.lax.broadcasted_iota(jnp.int32, label_lanes.shape, 1)

    @pl.when(step == 0)
    def _():
        label_lanes[...] = jnp.broadcast_to(labels[0], lane.shape[::-1]).T - lane

    def add(rows, columns, lanes):
        x = logits[rows, columns]
        total = _add_exponentials(_masked(spec, step, columns, x, -jnp.inf), lanes[:2])
        first, wanted = _first(spec, step, columns), label_lanes[rows]
        picked = [
            jnp.where(wanted == first + i * LANES, register, 0)
            for i, register in enumerate(_registers(x))
        ]
        return *total, _sum([*picked, lanes[2]])

    def finish():
        total = _sum_of_lanes(mantissas, exponents)
        label_logit = label_logits[...].sum(axis=1, keepdims=True)
        by_lane = jnp.where(lane == 0, total.mantissa, total.exponent)
        out[0] = jnp.where(lane == 2, label_logit, by_lane).T[:3]

    sums = [(mantissas, 0), (exponents, LOWEST), (label_logits, 0)]
    _accumulate(step, is_last, logits, add, sums, finish, LABELED_GROUP)


def _add_exponentials(x, lanes) -> Extended:
    """Adds Σ e^x over the registers of x [16, columns] to the sum in each lane, a pair of [16, 128]."""
    before, x = Extended(*lanes), _registers(x)
    exponent = _by_pairs(jnp.maximum, [*x, before.exponent])
    scaled = before.mantissa * jnp.exp(before.exponent - exponent)
    return Extended(_sum([*(jnp.exp(y - exponent) for y in x), scaled]), exponent)


def _by_pairs(function, values):
    """Folds values with a function of two that may be taken in any order: a chain would wait for each exponential."""
    while len(values) > 1:
        pairs = [function(*pair) for pair in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(values) // 2 * 2 :]
    return values[0]


_sum = functools.partial(_by_pairs, jnp.add)


def _sum_of_lanes(mantissas, exponents) -> Extended:
    """[rows, 128] -> [rows, 1]."""
    exponent = exponents[...].max(axis=1, keepdims=True)
    scaled = mantissas[...] * jnp.exp(exponents[...] - exponent)
    return Extended(scaled.sum(axis=1, keepdims=True), exponent)


def _accumulate(step, is_last, block, add, sums, finish, group=GROUP) -> None:
    """One step of sums over the last axis of the grid; `finish` is called after the last.

    `sums`: pairs of a scratch ref and what it begins with. `add(rows, columns, carry)` adds a group of columns to the
    carry, a part [16, 128] of each.
    """

    @pl.when(step == 0)
    def _():
        for ref, start in sums:
            ref[...] = jnp.full_like(ref, start)

    @pl.loop(0, block.shape[0] // ROWS)
    def _(i):
        rows = _rows(i)
        before = tuple(ref[rows] for ref, _ in sums)
        lanes = _fold_groups(block, functools.partial(add, rows), before, group)
        for (ref, _), value in zip(sums, lanes, strict=True):
            ref[rows] = value

    pl.when(is_last)(finish)


def _write(block, write) -> None:
    """Calls `write(rows, columns)` for all groups of columns of all rows of a block."""

    @pl.loop(0, block.shape[0] // ROWS)
    def _(i):
        _fold_groups(block, lambda columns, _: write(_rows(i), columns), None, GROUP)


def _rows(i):
    return pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)


def _fold_groups(block, function, carry, group):
    """Folds `function(columns, carry)` over the columns of a block; the last group may be narrower."""
    whole, rest = divmod(block.shape[1], group)

    def step(g, carry):
        return function(pl.ds(pl.multiple_of(g * group, group), group), carry)

    carry = jax.lax.fori_loop(0, whole, step, carry) if whole else carry
    return function(pl.ds(whole * group, rest), carry) if rest else carry


def _masked(spec, step, columns, x, fill):
    """x [16, columns] with `fill` past the last column, where blocks have such."""
    if spec.columns % spec.blocks.columns == 0:
        return x
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(column < spec.columns - _first(spec, step, columns), x, fill)


def _first(spec, step, columns):
    """The number of the first column of a group of a block."""
    return step * spec.blocks.columns + columns.start


def _registers(x):
    """[rows, n x 128] -> n x float32 [rows, 128]."""
    return [x[:, i : i + LANES].astype(jnp.float32) for i in range(0, x.shape[1], LANES)]


def _spec(interpret, x, sizes: Blocks) -> _Spec:
    return _Spec(sizes, x.shape[1], interpreter(interpret, x))


def _steps(length: int, block: int) -> int:
    return -(-length // block)
