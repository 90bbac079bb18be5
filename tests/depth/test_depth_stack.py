"""Blocks, stacks and the plain policy: scanning and rematerialising change nothing but time and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion_reference import D_MODEL, blocks, gradients, init, make_stack, packed, run

from effjax.depth import Block, MixtureOfRecursions, Plain, Recursive
from effjax.depth.stack import pattern_period
from effjax.ffn import Gated
from effjax.mixers import Attention, SlidingWindow
from effjax.nn import RMSNorm


def stacked(scope):
    """Parameters blocks_0, blocks_1, ... of an unrolled stack as a scan over single layers has them."""
    layers = [scope[f"blocks_{i}"] for i in range(len(scope))]
    return {"blocks_0": jax.tree.map(lambda *p: jnp.stack(p), *layers)}


def test_a_stack_of_blocks_is_a_llama(rng):
    x, positions, segment_ids = inputs = packed(rng)
    variables = init(Plain(), 2, rng, inputs)
    got, _ = run(Plain(), variables, inputs, 2, train=False)
    for row in range(len(x)):
        real = segment_ids[row] > 0
        parameters = jax.tree.map(np.asarray, variables["params"]["layers"])
        want, _ = blocks(
            parameters, x[row].astype(np.float64), positions[row], segment_ids[row], real
        )
        np.testing.assert_allclose(got[row][real], want[real], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("policy", "num_layers"),
    [(Plain(), 2), (Recursive(2, "cycle"), 4), (MixtureOfRecursions(2, "cycle"), 4)],
    ids=["plain", "recursive", "mixture_of_recursions"],
)
def test_scanned_layers_equal_unrolled_ones(policy, num_layers, rng):
    inputs = packed(rng)
    variables = init(policy, num_layers, rng, inputs, router_scale=20.0)
    scopes = variables["params"]
    scanned = {"params": {k: v if k == "routing" else stacked(v) for k, v in scopes.items()}}
    want, want_aux = run(policy, variables, inputs, num_layers, train=True)
    got, got_aux = run(policy, scanned, inputs, num_layers, train=True, scan_layers=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for name in want_aux:
        np.testing.assert_allclose(got_aux[name], want_aux[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        ("offload", True),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (("full", True), ("dots", False))),
    ],
)
def test_rematerialisation_keeps_gradients(remat, scan_layers, rng):
    inputs = packed(rng)
    policy = MixtureOfRecursions(2, "cycle", kv_sharing="shared")
    variables = init(policy, 4, rng, inputs, router_scale=20.0)
    if scan_layers:
        scopes = variables["params"]
        variables = {"params": scopes | {"shared": stacked(scopes["shared"])}}
    probe = rng.normal(size=inputs[0].shape).astype(np.float32)
    frugal, plain = (
        gradients(policy, variables, inputs, 4, probe, r, scan_layers) for r in (remat, "none")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), frugal, plain)


def test_a_scan_repeats_the_pattern_of_mixers():
    def block(mixer):
        return Block(mixer, Gated(), RMSNorm(), RMSNorm(), parent=None)

    pattern = [SlidingWindow(window=4), SlidingWindow(window=4), Attention()]
    assert pattern_period(tuple(block(m) for m in pattern * 2)) == 3
    assert pattern_period(tuple(block(m) for m in [*pattern, pattern[0]])) == 4
    assert pattern_period((block(Attention()), block(Attention()))) == 1


def test_an_unknown_remat_policy_is_refused(rng):
    inputs = packed(rng)
    with pytest.raises(ValueError, match="unknown remat 'ful'; did you mean 'full'"):
        run(Plain(), {"params": {}}, inputs, 1, train=False, remat="ful")


def test_flops_of_a_block_are_those_xla_counts():
    stack = make_stack(1)
    x = jnp.zeros((1, 64, D_MODEL))
    marks = {"positions": jnp.zeros((1, 64), int), "segment_ids": jnp.ones((1, 64), int)}
    shapes = jax.eval_shape(lambda: Plain().init(jax.random.key(0), stack, x, **marks))
    compiled = jax.jit(lambda v: Plain().apply(v, stack, x, **marks)[0]).lower(shapes).compile()
    ours = 64 * stack.flops_per_token(D_MODEL, 64)
    # XLA also counts what is not a matrix product, and the half of the attention that the mask removes.
    assert ours <= compiled.cost_analysis()["flops"] <= 1.7 * ours
