"""The roofs above that of operations: products that do not fill a matrix unit, and exponentials."""

import pytest

from benchmarks.kernels.roofline import CHIPS, Product, Work, roofline


@pytest.mark.parametrize(
    ("chip", "product", "rows"),
    [
        # A unit of 128 takes 153 features in two passes; 65 values are five registers of 16 rows.
        ("v5e", Product(65, 153, 128), 2 * 80),
        ("v6e", Product(65, 153, 128), 80),
        # Tokens lie in the unit and 16 dimensions go through it, not the other way round.
        ("v5e", Product(16, 128, 256), 2 * 16),
        ("v5e", Product(256, 16, 256, times=3), 3 * 2 * 256),
        ("v6e", Product(256, 16, 256), 256),
        ("v6e", Product(1024, 1024, 1024), 16 * 1024),
    ],
)
def test_a_narrow_product_takes_as_long_as_one_that_fills_the_unit(chip, product, rows):
    # Four units of a row a cycle, or two of two.
    assert CHIPS[chip].padded_cycles(product) == rows / 4


def test_of_several_ways_the_fastest_counts_and_both_roofs_are_told():
    narrow, wide = Product(128, 8, 128, times=4), Product(256, 8, 256, times=1)
    work = Work(matmul_flops=4 * 2 * 128 * 8 * 128, products=((narrow,), (wide,)))
    found = roofline(CHIPS["v6e"], work, 0)
    assert (found.bound, found.cycles) == ("padded matmul", 256 / 4)
    assert found.roofs["matmul"] == work.matmul_flops / CHIPS["v6e"].matmul_flops_per_cycle
    thrice = roofline(CHIPS["v6e"], work.times(3), 0)
    assert thrice.roofs == {name: 3 * cycles for name, cycles in found.roofs.items()}


def test_a_full_product_has_the_roof_of_its_operations():
    product = Product(512, 512, 512)
    work = Work(matmul_flops=2 * 512**3, products=((product,),))
    for chip in CHIPS.values():
        roofs = roofline(chip, work, 0).roofs
        assert roofs["padded matmul"] == roofs["matmul"]


def test_exponentials_have_a_unit_of_their_own():
    found = roofline(CHIPS["v5e"], Work(vector_flops=4096 * 10, exponentials=1024 * 11), 0)
    assert (found.cycles, found.bound) == (11, "exponential")
