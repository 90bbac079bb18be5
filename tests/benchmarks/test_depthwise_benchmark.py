"""What the depth-wise benchmark makes of a mean depth."""

import numpy as np
import pytest

from benchmarks.depthwise.texts import load_of_mean


@pytest.mark.parametrize("num_recursions", [2, 3, 4])
def test_the_load_has_the_mean_and_is_even_where_that_is_in_the_middle(num_recursions):
    depths = np.arange(1, num_recursions + 1)
    for mean in np.linspace(1, num_recursions, 9):
        load = load_of_mean(mean, num_recursions)
        np.testing.assert_allclose([load.sum(), load @ depths], [1, mean], atol=1e-6)
        # Powers of one number: the one load of highest entropy with that mean.
        np.testing.assert_allclose(load[1:-1] ** 2, load[2:] * load[:-2], atol=1e-9)
    np.testing.assert_allclose(load_of_mean(depths.mean(), num_recursions), 1 / num_recursions)
