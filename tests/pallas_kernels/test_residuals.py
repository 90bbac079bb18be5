"""Rematerialisation that keeps the named results of the ops runs none of their forward passes twice."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import residuals

TOKENS, HEADS, DIM = 32, 2, 16


def heads(count=HEADS):
    return jax.ShapeDtypeStruct((1, TOKENS, count, DIM), jnp.float32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


OPS = {
    "attention": (heads(), heads(), heads()),
    "linear_attention": (heads(), heads(), heads()),
    "selective_scan": (
        floats(1, TOKENS, DIM),
        floats(1, TOKENS, DIM),
        floats(DIM, 4),
        floats(1, TOKENS, 4),
        floats(1, TOKENS, 4),
    ),
    "ssd_scan": (heads(), floats(1, TOKENS, HEADS), floats(HEADS), heads(1), heads(1)),
}


@pytest.mark.parametrize("implementation", ["tpu_interpret", "xla"])
@pytest.mark.parametrize("op", list(OPS))
def test_named_residuals_are_not_computed_again(op, implementation):
    call = functools.partial(getattr(pallas_kernels, op), implementation=implementation)

    def loss(*arguments):
        y = call(*(2.0 * x for x in arguments))
        return jnp.sum(jnp.tanh(3.0 * y))

    def loops(policy):
        remat = jax.checkpoint(loss, policy=policy)
        every = tuple(range(len(OPS[op])))
        return count(jax.make_jaxpr(jax.grad(remat, argnums=every))(*OPS[op]).jaxpr)

    policies = jax.checkpoint_policies
    kept = loops(policies.save_only_these_names(residuals.NAME))
    assert kept == loops(policies.everything_saveable)
    assert kept < loops(policies.nothing_saveable)


def count(jaxpr) -> int:
    """Kernels and loops in a program that compute floats; what is inside of these does not count."""
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name in ("pallas_call", "scan", "while"):
            total += any(jnp.issubdtype(x.aval.dtype, jnp.floating) for x in equation.outvars)
        else:
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
            total += sum(count(x) for x in inner if is_jaxpr(x))
    return total


def is_jaxpr(x) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
