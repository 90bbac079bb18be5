"""The roofs of the units: products that do not fill a matrix unit, and exponentials."""

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
    assert CHIPS[chip].matmul_cycles(product) == rows / 4


def test_of_several_ways_the_fastest_counts():
    narrow, wide = Product(128, 8, 128, times=4), Product(256, 8, 256)
    found = roofline(CHIPS["v6e"], [Work((narrow,)), Work((wide,))], 0)
    assert (found.bound, found.cycles) == ("matmul", 256 / 4)
    # The wide one has more to do elsewhere.
    ways = [Work((narrow,)), Work((wide,), vector_flops=4096 * 200)]
    assert roofline(CHIPS["v6e"], ways, 0).cycles == 4 * 128 / 4


def test_work_adds_up():
    work = Work((Product(512, 512, 512),), vector_flops=4096 * 2, exponentials=1024)
    for chip in CHIPS.values():
        once, thrice = (roofline(chip, [x], 0).roofs for x in (work, work + work.times(2)))
        assert thrice == {name: 3 * cycles for name, cycles in once.items()}
        assert once["matmul"] == 2 * 512**3 / chip.matmul_flops_per_cycle


def test_the_highest_roof_counts():
    work = Work(vector_flops=4096 * 8, exponentials=1024 * 11)
    found = roofline(CHIPS["v5e"], [work], 0)
    assert (found.cycles, found.bound) == (11, "exponential")
    assert found.roofs["vector"] == 8 + 11 / 4
