"""Pallas kernels: their products, counted by hand, and found again in a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from effjax.training.planning import kernels
from effjax.training.planning.hlo import Program
from effjax.training.planning.kernels import Product


def scaled_product(x_ref, w_ref, out_ref):
    """Of a step either region is done; the loop has three trips."""
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _():
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    @pl.when(step != 0)
    def _():
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...]) + 1.0

    def body(_, total):
        return total + jnp.dot(x_ref[...], w_ref[...])

    out_ref[...] += jax.lax.fori_loop(0, 3, body, jnp.zeros((8, 16)))


def call(x, w):
    return pl.pallas_call(
        scaled_product,
        grid=(5,),
        in_specs=[
            pl.BlockSpec((8, 32), lambda i: (i, 0)),
            pl.BlockSpec((32, 16), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((40, 16), jnp.float32),
        name="scaled_product",
        interpret=True,
    )(x, w)


@pytest.fixture
def found():
    def in_a_loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tile(call(x, w), (1, 2)), None), x, None, length=7)[0]

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((40, 32), (32, 16)))
    return kernels.kernels(jax.jit(in_a_loop).trace(*shapes).jaxpr)


def test_products_of_a_step_times_the_steps(found):
    (kernel,) = found
    assert (kernel.name, kernel.results) == ("scaled_product", ((40, 16),))
    # One of the regions and three trips, at each of five steps.
    assert kernel.flops == 5 * (1 + 3) * 2 * 8 * 32 * 16


def test_a_narrow_product_keeps_a_matrix_unit_as_busy_as_a_wide_one():
    product = Product(rows=100, contracted=64, columns=300, times=2)
    assert product.flops == 2 * 2 * 100 * 64 * 300
    # The 100 rows lie in the unit, in place of 128, and 300 columns go through it, 64 deep in place of 128.
    assert product.padded_flops(128) == 2 * 2 * 128 * 128 * 300


def test_a_kernel_is_found_in_the_compiled_program(found):
    (kernel,) = found
    text = """ENTRY %main (a: f32[40,32]) -> f32[40,16] {
  %a = f32[40,32]{1,0} parameter(0)
  %other.1 = f32[40,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  %scaled_product.2 = f32[8,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %jit_scaled_product_.3 = f32[40,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    runs = Program(text).entry.instructions.values()
    named = {x.name: kernels.of_instruction([kernel], x) for x in runs}
    assert named == {
        "a": None,
        "other.1": None,
        "scaled_product.2": None,
        "jit_scaled_product_.3": kernel,
    }
