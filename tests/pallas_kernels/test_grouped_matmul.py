"""grouped_matmul: against NumPy slices, then the fast form against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import assert_close, relative_error

from pallas_kernels import grouped_matmul


def by_slices(lhs, rhs, group_sizes):
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    ends = np.cumsum(group_sizes)
    for matrix, end, size in zip(rhs, ends, group_sizes, strict=True):
        out[end - size : end] = lhs[end - size : end] @ matrix
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "group_sizes",
    [[70, 130, 1, 99], [0, 200, 0, 0], [5, 0, 9, 64], [0, 0, 0, 0], [300, 0, 0, 0], [0, 0, 0, 299]],
)
def test_equals_slices(rng, implementation, group_sizes):
    lhs, rhs = rng.normal(size=(300, 7)), rng.normal(size=(4, 7, 5))
    got = grouped_matmul(
        jnp.asarray(lhs, jnp.float32),
        jnp.asarray(rhs, jnp.float32),
        jnp.asarray(group_sizes),
        implementation=implementation,
    )
    want = by_slices(lhs, rhs, group_sizes)
    assert relative_error(got, want) < 1e-5
    assert np.all(got[sum(group_sizes) :] == 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("num_rows", "group_sizes"),
    [(300, [70, 120, 0, 99]), (40, [10, 0, 3, 27]), (11, [1, 0, 9, 1])],
)
def test_xla_with_every_gradient_equals_float64(rng, num_rows, group_sizes, dtype):
    inputs = {"lhs": rng.normal(size=(num_rows, 9)), "rhs": rng.normal(size=(4, 9, 11))}
    cotangents = {"out": rng.normal(size=(num_rows, 11))}

    def make_function(implementation):
        def function(lhs, rhs):
            sizes = jnp.asarray(group_sizes)
            return {"out": grouped_matmul(lhs, rhs, sizes, implementation=implementation)}

        return function

    assert_close(make_function, inputs, cotangents, dtype)


def test_rows_of_no_group_are_not_read(rng):
    """A product that is computed and dropped would do; one that reaches a gradient would show as NaN."""
    lhs = jnp.asarray(rng.normal(size=(500, 4)), jnp.float32).at[200:].set(jnp.nan)
    rhs = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    sizes = jnp.asarray([64, 100, 36])
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), lhs, rhs)
    d_lhs, d_rhs = pull(out)
    for x in (out, d_lhs, d_rhs):
        assert np.all(np.isfinite(x))
    assert np.all(out[200:] == 0) and np.all(d_lhs[200:] == 0)


def test_under_jit_vmap_remat_and_scan(rng):
    lhs = jnp.asarray(rng.normal(size=(3, 100, 4)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 2, 4, 4)), jnp.float32)
    sizes = jnp.asarray([[30, 70], [0, 20], [99, 1]])

    def loss(lhs, rhs, sizes):
        return jnp.sum(jnp.sin(grouped_matmul(lhs, rhs, sizes)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    each = [gradient(*x) for x in zip(lhs, rhs, sizes, strict=True)]
    want = [np.stack(x) for x in zip(*each, strict=True)]

    def layers(lhs, rhs):
        def layer(total, x):
            return total + loss(*x), None

        return jax.lax.scan(layer, 0.0, (lhs, rhs, sizes))[0]

    got = {
        "vmap": jax.jit(jax.vmap(gradient))(lhs, rhs, sizes),
        "remat": jax.jit(jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1))))(lhs, rhs, sizes),
        "scan": jax.jit(jax.grad(layers, argnums=(0, 1)))(lhs, rhs),
    }
    for how, gradients in got.items():
        for x, y in zip(gradients, want, strict=True):
            assert relative_error(x, y) < 1e-6, how


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lhs": np.ones((2, 6, 4), "f")}, r"lhs must be \[M, K\], not of shape \(2, 6, 4\)"),
        ({"rhs": np.ones((4, 5), "f")}, r"rhs must be \[G, K, N\], not of shape \(4, 5\)"),
        ({"rhs": np.ones((3, 3, 5), "f")}, "must have K=4 rows"),
        ({"rhs": np.ones((3, 4, 5), "float16")}, "rhs has dtype float16 but lhs has float32"),
        ({"lhs": np.ones((6, 4), "i")}, "lhs must be floating point, not int32"),
        ({"lhs": np.ones((0, 4), "f")}, "lhs has an axis of size 0"),
        ({"group_sizes": np.ones(2, int)}, r"group_sizes must be of shape \(3,\), not \(2,\)"),
        ({"group_sizes": np.ones(3, "f")}, "group_sizes must be integer, not float32"),
        ({"implementation": "megablox"}, "implementation='megablox' is unknown"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "lhs": np.ones((6, 4), "f"),
        "rhs": np.ones((3, 4, 5), "f"),
        "group_sizes": np.ones(3, int),
    } | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments)
