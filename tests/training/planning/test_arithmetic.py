"""Operations and bytes of instructions, beside counts by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.training.planning import arithmetic
from effjax.training.planning.hlo import Program


def flops(program):
    return sum(
        run.times * arithmetic.matmul_flops(run.instruction, run.computation)
        for run in program.runs()
    )


def traffic(program):
    return sum(
        run.times * arithmetic.memory_bytes(run.instruction, run.computation, program)
        for run in program.runs()
        if not run.is_fused
    )


def compiled(function, *shapes):
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return Program(jax.jit(function).lower(*arrays).compile().as_text())


def convolution(left, right, out, labels, window=""):
    """A program of one convolution."""
    text = [f"f32[{','.join(map(str, shape))}]" for shape in (left, right, out)]
    return Program(
        f"ENTRY %main (x: {text[0]}, w: {text[1]}) -> {text[2]} {{\n"
        f"  %x = {text[0]} parameter(0)\n  %w = {text[1]} parameter(1)\n"
        f"  ROOT %y = {text[2]} convolution(%x, %w), {window}dim_labels={labels}\n}}\n"
    )


def test_a_product_of_batches(rng):
    b, m, k, n = rng.integers(2, 9, 4)
    program = compiled(lambda x, w: jnp.einsum("bmk,bkn->bmn", x, w), (b, m, k), (b, k, n))
    assert flops(program) == 2 * b * m * k * n


def test_a_scanned_product_costs_what_the_unrolled_one_does(rng):
    length, m, k = rng.integers(2, 9, 3)

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]

    def unrolled(x, ws):
        for i in range(length):
            x = jnp.sin(x @ ws[i])
        return x

    gradients = (jax.grad(lambda *args, f=f: f(*args).sum(), (0, 1)) for f in (scanned, unrolled))
    shapes = ((m, k), (length, k, k))
    by_scan, by_hand = (flops(compiled(gradient, *shapes)) for gradient in gradients)
    # Forward, and two products for each backward.
    assert by_scan == by_hand == 3 * length * 2 * m * k * k


def test_a_tpus_product_of_batches_is_a_convolution(rng):
    """The batch is a window of which one position in B meets an element."""
    b, m, k, n = (int(x) for x in rng.integers(2, 9, 4))
    window = f"window={{size={b} stride={b - 1} lhs_dilate={b}}}, "
    program = convolution((b, m, k), (b, k, n), (b, m, n), "0bf_0io->0bf", window)
    assert flops(program) == 2 * b * m * k * n


@pytest.mark.parametrize(
    ("stride", "dilation", "low", "high"), [(1, 1, 0, 0), (2, 1, 1, 2), (1, 2, 2, 2)]
)
def test_positions_on_padding_do_not_count(rng, stride, dilation, low, high):
    size, kernel, features_in, features_out, batch = (int(x) for x in rng.integers(4, 8, 5))
    kernel -= 2
    out = (size + low + high - (kernel - 1) * dilation - 1) // stride + 1
    window = f"window={{size={kernel} stride={stride} pad={low}_{high} rhs_dilate={dilation}}}, "
    shapes = (batch, size, features_in), (kernel, features_in, features_out)
    program = convolution(*shapes, (batch, out, features_out), "b0f_0io->b0f", window)
    met = sum(
        0 <= o * stride - low + k * dilation < size
        for o, k in itertools.product(range(out), range(kernel))
    )
    assert flops(program) == 2 * met * batch * features_in * features_out


def test_a_loop_reads_a_slice_of_its_stack_at_a_time():
    """Not the whole stack of matrices at each trip, as the operands of its fusions would have it."""
    length, size = 64, 32

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), x, ws)[0]

    stack = length * size * size * 4
    found = traffic(compiled(scanned, (size, size), (length, size, size)))
    # Of each trip the slice, and the carry in and out once or twice.
    assert stack < found < 8 * stack


def test_what_stays_on_the_chip_is_no_traffic():
    text = """ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %y = f32[8,128]{1,0:T(8,128)S(1)} negate(%x)
  ROOT %z = f32[8,128]{1,0:T(8,128)} negate(%y)
}
"""
    assert traffic(Program(text)) == 2 * 8 * 128 * 4
    assert traffic(Program(text.replace("S(1)", ""))) == 4 * 8 * 128 * 4


def test_an_update_in_place_writes_the_update():
    def updated(x, row, i):
        return jax.lax.dynamic_update_slice(x, row, (i, 0))

    shapes = [((512, 64), jnp.float32), ((1, 64), jnp.float32), ((), jnp.int32)]
    arrays = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    text = jax.jit(updated, donate_argnums=0).lower(*arrays).compile().as_text()
    assert traffic(Program(text)) < 16 * 64 * 4
    assert np.prod(shapes[0][0]) * 4 > 64 * 16 * 64
