"""Softmax and cross-entropy for TPU (Pallas, Mosaic): one read of the logits makes the sum, none the maximum.

Each of the 128 lanes keeps a sum m e^n of its own through all columns of a row; only the last step adds lanes up. In
`softmax`, where all columns of a row are one block, its terms stay in VMEM, with the exponent that each group of them
has in common, and are only scaled on the way out; else the grid goes over the columns twice, to sum and to write. The
gradient of the softmax does the same without terms. That of the cross-entropy is elementwise, one fusion of XLA, and
is `xla.logits_gradient`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.softmax import xla
from pallas_kernels.softmax.extended import Extended
from pallas_kernels.softmax.tpu_blocks import (
    LANES,
    ROWS,
    VMEM_LIMIT,
    Blocks,
    one_pass_blocks,
    two_pass_blocks,
)
from pallas_kernels.tpu_call import tpu_call
from pallas_kernels.varying import interpreter, shaped_like, vary_alike

# Columns of 16 rows that are read into registers at once, with one exponent for each lane; of the cross-entropy, which
# writes nothing meanwhile, so many that few are spilled. The groups of so many columns are one body of a loop.
GROUP, LOSS_GROUP = 32 * LANES, 16 * LANES
UNROLLED = 64 * LANES
# Rows of a register of float32.
SUBLANES = 8
LOWEST = float(jnp.finfo(jnp.float32).min)


class _Spec(NamedTuple):
    """The static arguments of a kernel. `columns`: V; `interpret`: as `pallas_call` takes it."""

    blocks: Blocks
    columns: int
    interpret: bool | pltpu.InterpretParams

    @property
    def is_whole(self) -> bool:
        """Whether all columns of a row are one block."""
        return self.blocks.columns >= self.columns


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
    return _two_passes(_softmax_kernel, interpret, x, keeps_terms=True)


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
    grid = _steps(num_rows, sizes.rows), _steps(num_columns, sizes.columns)
    of_labels = pl.BlockSpec(
        (1, 1, 1, sizes.rows), lambda i, j: (i, j, 0, 0), memory_space=pltpu.SMEM
    )
    outputs = tpu_call(
        functools.partial(_cross_entropy_kernel, spec),
        grid=grid,
        in_specs=[pl.BlockSpec(sizes, lambda i, j: (i, j)), of_labels, of_labels],
        # Values of a row lie along the lanes, as columns of one lane would take 128 times the memory.
        out_specs=pl.BlockSpec((1, 3, sizes.rows), lambda i, j: (i, 0, 0)),
        out_shape=shaped_like(logits, (grid[0], 3, sizes.rows), jnp.float32),
        scratch_shapes=[pltpu.VMEM((sizes.rows, LANES), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=spec.interpret,
        name="cross_entropy",
    )(logits, *_places(spec, grid, labels))
    mantissa, exponent, label_logits = outputs.swapaxes(0, 1).reshape(3, -1)[:, :num_rows]
    total = Extended(mantissa, exponent)
    return xla.loss_and_lse(total, label_logits), (logits, labels, total)


def _places(spec, grid, labels):
    """Where in each block the label of each row is, [steps, steps, 1, rows] int32.

    Returns:
        The first column of its register and, counting lanes along 8 rows of that, its own number; -1: not in the block.
    """
    rows, columns = spec.blocks
    # A label past the last column must not find one that fills up a block.
    labels = jnp.where(labels < spec.columns, labels, -1)
    by_step = jnp.pad(labels, (0, grid[0] * rows - labels.size)).reshape(-1, 1, 1, rows)
    column = by_step - columns * jnp.arange(grid[1], dtype=labels.dtype)[:, None, None]
    is_inside = (column >= 0) & (column < columns)
    row = jnp.arange(rows, dtype=labels.dtype) % SUBLANES
    register = jnp.where(is_inside, column // LANES * LANES, 0)
    return register, jnp.where(is_inside, row * LANES + column % LANES, -1)


def _cross_entropy_backward(interpret, saved, cotangents):
    logits, labels, total = saved
    return xla.logits_gradient(logits, labels, total, *cotangents), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _to_rows(x):
    """[..., V] -> [N, V], of at least the rows of one register: zeros fill up fewer."""
    x = x.reshape(-1, x.shape[-1])
    return jnp.pad(x, ((0, max(0, ROWS - x.shape[0])), (0, 0)))


def _two_passes(kernel, interpret, *arrays, keeps_terms=False):
    """Runs `kernel` on arrays [N, V], on a grid of (blocks of rows, pass, blocks of columns); returns [N, V].

    Where rows are whole, both passes are one step, and a kernel that `keeps_terms` is given scratch for them.
    """
    num_rows, num_columns = arrays[0].shape
    bytes_per_entry = (len(arrays) + 1) * arrays[0].dtype.itemsize
    sizes = two_pass_blocks(num_rows, num_columns, bytes_per_entry)
    spec = _spec(interpret, arrays[0], sizes)
    scratch = [(sizes.rows, LANES)] * 2
    if spec.is_whole and keeps_terms:
        scratch += [sizes, (sizes.rows, _steps(sizes.columns, GROUP) * LANES)]
    return tpu_call(
        functools.partial(kernel, spec),
        grid=(
            _steps(num_rows, sizes.rows),
            1 if spec.is_whole else 2,
            _steps(num_columns, sizes.columns),
        ),
        in_specs=[pl.BlockSpec(sizes, lambda i, p, j: (i, j)) for _ in arrays],
        # The first pass writes nothing: its block of the output is the one that the second begins with.
        out_specs=pl.BlockSpec(sizes, lambda i, p, j: (i, p * j)),
        out_shape=shaped_like(arrays[0], arrays[0].shape, arrays[0].dtype),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=spec.interpret,
        name=kernel.__name__.strip("_"),
    )(*arrays)


def _softmax_kernel(spec, x, y, mantissas, exponents, terms=None, group_exponents=None):
    """Refs [rows, columns] and scratch [rows, 128]: a sum in each lane, then 1 / m and n of the row in all lanes.

    Of whole rows also scratch [rows, columns] for the terms and [rows, groups x 128] for their exponents.
    """
    step = pl.program_id(2)

    def add(rows, columns, lanes):
        wide = _masked(spec, step, columns, x[rows, columns], -jnp.inf)
        lanes, new_terms = _add_exponentials(wide, lanes)
        if spec.is_whole:
            terms[rows, columns] = jnp.concatenate(new_terms, axis=1)
            group_exponents[rows, _lanes_of_group(columns)] = lanes[1]
        return lanes

    def finish():
        total = _sum_of_lanes(mantissas, exponents)
        mantissas[...] = jnp.broadcast_to(1 / total.mantissa, mantissas.shape)
        exponents[...] = jnp.broadcast_to(total.exponent, exponents.shape)

    def write(rows, columns):
        factor, exponent = mantissas[rows], exponents[rows]
        if spec.is_whole:
            factor *= jnp.exp(group_exponents[rows, _lanes_of_group(columns)] - exponent)
            out = [term * factor for term in _registers(terms[rows, columns])]
        else:
            out = [jnp.exp(x - exponent) * factor for x in _registers(x[rows, columns])]
        y[rows, columns] = jnp.concatenate(out, axis=1).astype(y.dtype)

    _sum_and_write(spec, x, [(mantissas, 0), (exponents, LOWEST)], add, finish, write)


def _softmax_gradient_kernel(spec, y, dy, dx, products, totals):
    """y (dy - Σ y dy / Σ y), as in `xla`; refs [rows, columns] and scratch [rows, 128]: a sum in each lane.

    After the first pass `products` has Σ y dy / Σ y of the row in all lanes.
    """
    step = pl.program_id(2)

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

    _sum_and_write(spec, y, [(products, 0), (totals, 0)], add, finish, write)


def _cross_entropy_kernel(
    spec, logits, registers, numbers, out, mantissas, exponents, label_logits
):
    """Refs logits [rows, columns], places of labels [1, 1, 1, rows] and out [1, 3, rows]: m, n, the label's logit.

    Scratch [rows, 128]: a sum in each lane.
    """
    step, is_last = pl.program_id(1), pl.program_id(1) == pl.num_programs(1) - 1
    number = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0) * LANES
    number += jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)

    def add_group(rows, columns, lanes):
        x = _masked(spec, step, columns, logits[rows, columns], -jnp.inf)
        return _add_exponentials(x, lanes)[0]

    def add(rows, lanes):
        total = _fold_groups(logits, functools.partial(add_group, rows), lanes[:2], LOSS_GROUP)
        # Nothing is looked for: the one register with the label is read once more.
        parts = [lanes[2][:SUBLANES], lanes[2][SUBLANES:]]
        for i in range(ROWS):
            at, part = (0, 0, 0, rows.start + i), i // SUBLANES
            columns = pl.ds(pl.multiple_of(registers[at], LANES), LANES)
            found = logits[rows, columns].astype(jnp.float32)[part * SUBLANES :][:SUBLANES]
            parts[part] = jnp.where(number == numbers[at], found, parts[part])
        return *total, jnp.concatenate(parts)

    def finish():
        total = _sum_of_lanes(mantissas, exponents)
        label_logit = label_logits[...].sum(axis=1, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, label_logits.shape, 1)
        by_lane = jnp.where(lane == 0, total.mantissa, total.exponent)
        out[0] = jnp.where(lane == 2, label_logit, by_lane).T[:3]

    sums = [(mantissas, 0), (exponents, LOWEST), (label_logits, 0)]
    _accumulate(step, is_last, logits, sums, add, finish)


def _add_exponentials(x, lanes):
    """Adds Σ e^x over the registers of x [16, columns] to m e^n in each lane, `lanes` = (m, n), each [16, 128].

    Returns the new `lanes`, and the terms e^(x - n), each [16, 128].
    """
    (mantissa, before), x = lanes, _registers(x)
    exponent = _by_pairs(jnp.maximum, [*x, before])
    terms = [jnp.exp(y - exponent) for y in x]
    return (_sum([*terms, mantissa * jnp.exp(before - exponent)]), exponent), terms


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


def _sum_and_write(spec, block, sums, add, finish, write) -> None:
    """One step of a kernel of two passes: both of whole rows, else one.

    For groups of columns of 16 rows, `add(rows, columns, lanes)` returns the sums in the lanes, each [16, 128], with
    those of the group, and `write(rows, columns)` writes it; for the others see `_accumulate`.
    """

    step, is_last = pl.program_id(2), pl.program_id(2) == pl.num_programs(2) - 1
    is_first_pass = pl.program_id(1) == 0

    def sum_up():
        def add_groups(rows, lanes):
            return _fold_groups(block, functools.partial(add, rows), lanes, GROUP)

        _accumulate(step, is_last, block, sums, add_groups, finish)

    def write_out():
        @pl.loop(0, block.shape[0] // ROWS, unroll=2)
        def _(i):
            _fold_groups(block, lambda columns, _: write(_rows(i), columns), None, GROUP)

    if spec.is_whole:
        sum_up()
        write_out()
    else:
        pl.when(is_first_pass)(sum_up)
        pl.when(~is_first_pass)(write_out)


def _accumulate(step, is_last, block, sums, add, finish) -> None:
    """One step of sums over the last axis of the grid; `finish` is called after the last.

    `sums`: pairs of a scratch ref and what it begins with. `add(rows, lanes)` adds the block's columns of 16 rows to
    the sums in the lanes, each [16, 128].
    """

    @pl.loop(0, block.shape[0] // ROWS, unroll=2)
    def _(i):
        rows = _rows(i)
        before = tuple(jnp.where(step == 0, float(start), ref[rows]) for ref, start in sums)
        for (ref, _), value in zip(sums, add(rows, before), strict=True):
            ref[rows] = value

    pl.when(is_last)(finish)


def _rows(i):
    return pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)


def _fold_groups(block, function, carry, group):
    """Folds `function(columns, carry)` over the columns of a block; the last group may be narrower."""
    whole, rest = divmod(block.shape[1], group)

    def step(g, carry):
        return function(pl.ds(pl.multiple_of(g * group, group), group), carry)

    if whole:
        carry = jax.lax.fori_loop(0, whole, step, carry, unroll=min(whole, UNROLLED // group))
    return function(pl.ds(whole * group, rest), carry) if rest else carry


def _masked(spec, step, columns, x, fill):
    """x [16, columns] with `fill` past the last column, where blocks have such."""
    if spec.columns % spec.blocks.columns == 0:
        return x
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = step * spec.blocks.columns + columns.start
    return jnp.where(column < spec.columns - first, x, fill)


def _lanes_of_group(columns):
    """Where those of a group of columns are in scratch of 128 lanes a group."""
    # `//` looks at signs, by a function that is lowered outside of `tpu_call`.
    group = jax.lax.div(jnp.int32(columns.start), jnp.int32(GROUP))
    return pl.ds(pl.multiple_of(group * LANES, LANES), LANES)


def _registers(x):
    """[rows, n x 128] -> n x float32 [rows, 128]."""
    return [x[:, i : i + LANES].astype(jnp.float32) for i in range(0, x.shape[1], LANES)]


def _spec(interpret, x, sizes: Blocks) -> _Spec:
    return _Spec(sizes, x.shape[1], interpreter(interpret, x))


def _steps(length: int, block: int) -> int:
    return -(-length // block)
