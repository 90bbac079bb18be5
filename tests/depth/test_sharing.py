"""Which parameters each layer uses: against lists written out by hand."""

import jax
import numpy as np
import pytest
from recursion_reference import D_MODEL, init, make_stack, packed, run

from effjax.depth import Plain, Recursive
from effjax.depth.sharing import Layout

LISTS = {
    # strategy: (layers, recursions, the layer whose parameters each layer uses, layers of each recursion)
    "cycle": (6, 3, [0, 1, 0, 1, 0, 1], [[0, 1], [0, 1], [0, 1]]),
    "sequence": (6, 3, [0, 0, 0, 3, 3, 3], [[0, 0], [0, 3], [3, 3]]),
    "middle_cycle": (8, 3, [0, 1, 2, 1, 2, 1, 2, 7], [[1, 2], [1, 2], [1, 2]]),
    "middle_sequence": (8, 3, [0, 1, 1, 1, 4, 4, 4, 7], [[1, 1], [1, 4], [4, 4]]),
    "untied": (4, 2, [0, 1, 2, 3], [[0, 1], [2, 3]]),
    "middle_untied": (6, 2, [0, 1, 2, 3, 4, 5], [[1, 2], [3, 4]]),
}
# Those that share, for which the parameters of each layer are looked up below.
TYING = [strategy for strategy in LISTS if "untied" not in strategy]


@pytest.mark.parametrize("strategy", LISTS)
def test_layers_of_a_strategy(strategy):
    num_layers, num_recursions, layers, recursions = LISTS[strategy]
    layout = Layout.of(strategy, num_layers, num_recursions)
    assert list(layout.layers) == layers
    assert [[one for i in step for one in layout.shared[i]] for step in layout.steps] == recursions


@pytest.mark.parametrize("strategy", TYING)
def test_recursive_is_the_plain_transformer_with_tied_layers(strategy, rng):
    num_layers, num_recursions, layers, _ = LISTS[strategy]
    inputs = packed(rng)
    policy = Recursive(num_recursions, strategy)
    variables = init(policy, num_layers, rng, inputs)
    assert len(jax.tree.leaves(variables)) == 9 * len(set(layers))

    scopes = variables["params"]
    unique = {}  # layer that a block stands for -> its parameters
    if "middle" in strategy:
        unique |= {0: scopes["first"]["blocks_0"], num_layers - 1: scopes["last"]["blocks_0"]}
    repeated = [layer for layer in dict.fromkeys(layers) if layer not in unique]
    for i, layer in enumerate(repeated):
        cycle = strategy.endswith("cycle")
        unique[layer] = (
            scopes["shared"][f"blocks_{i}"] if cycle else scopes[f"shared_{i}"]["blocks_0"]
        )
    tied = {"params": {"layers": {f"blocks_{i}": unique[layer] for i, layer in enumerate(layers)}}}

    got, aux = run(policy, variables, inputs, num_layers, train=True)
    want, plain_aux = run(Plain(), tied, inputs, num_layers, train=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux["flops/spent"], plain_aux["flops/spent"], rtol=1e-6)
    np.testing.assert_allclose(
        aux["flops/full"], make_stack(num_layers).flops_per_token(D_MODEL, inputs[0].shape[1])
    )


@pytest.mark.parametrize(
    ("strategy", "num_layers", "num_recursions", "message"),
    [
        ("middle_cycle", 7, 3, "num_layers=7 .* valid: num_layers of 5, 8, 11"),
        ("middle_sequence", 2, 3, "num_layers=2 .* valid: num_layers of 5, 8, 11"),
        ("cycle", 5, 2, "num_layers=5 .* valid: num_layers of 2, 4, 6"),
        ("middle_circle", 8, 3, "unknown sharing 'middle_circle'; did you mean 'middle_cycle'"),
        ("cycle", 6, 0, "num_recursions=0; valid: at least 1"),
    ],
)
def test_layers_that_do_not_divide_are_refused(strategy, num_layers, num_recursions, message):
    with pytest.raises(ValueError, match=message):
        Layout.of(strategy, num_layers, num_recursions)
