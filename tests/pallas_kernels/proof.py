"""How a kernel is held against its reference: relative error by norm, forward and every gradient, float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import topology

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
FEW = 16  # entries
# Every chip that kernels are compiled for; beyond the first only with `-m slow`.
CHIPS = ("v5e", pytest.param("v6e", marks=pytest.mark.slow))


def by_chip(cases: dict) -> list:
    """Names of cases whose first entry is the chip, those of the others than the first marked slow."""
    slow = pytest.mark.slow
    return [
        name if case[0] == CHIPS[0] else pytest.param(name, marks=slow)
        for name, case in cases.items()
    ]


def rest_slow(cases, *default) -> list:
    """Cases of which those not in `default` are for `-m slow`: kernels take seconds to be interpreted."""
    return [
        case if case in default else pytest.param(*_values(case), marks=pytest.mark.slow)
        for case in cases
    ]


def _values(case) -> tuple:
    return case if isinstance(case, tuple) else (case,)


def relative_error(got, want) -> float:
    """|got - want| / |want| over the finite entries of `want`; the others must be equal."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    scale = np.linalg.norm(want[finite])
    return float(np.linalg.norm(got[finite] - want[finite]) / (scale if scale else 1))


def outputs_and_gradients(function, inputs: dict, cotangents: dict, dtype) -> dict[str, np.ndarray]:
    """Outputs of `function(**inputs)`, a dict, and the gradient of their inner product with `cotangents`.

    Entries of an output that are not finite (the log-sum-exp of a row that sees nothing) take no part.
    """

    def loss(inputs):
        outputs = function(**inputs)
        products = [
            jnp.sum(jnp.where(jnp.isfinite(outputs[name]), outputs[name] * cotangent, 0))
            for name, cotangent in cotangents.items()
        ]
        return sum(products), outputs

    def cast(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)

    cotangents = cast(cotangents)
    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(cast(inputs))
    return outputs | {f"d_{name}": gradient for name, gradient in gradients.items()}


def assert_close(
    make_function, inputs: dict, cotangents: dict, dtype: str, implementation: str = "xla"
) -> None:
    """Holds `make_function(implementation)` in `dtype` against "reference" in float64 on the same values."""
    rounded = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, dtype), np.float64), (inputs, cotangents)
    )
    with jax.enable_x64(True):
        want = outputs_and_gradients(make_function("reference"), *rounded, jnp.float64)
        want = {name: np.asarray(x) for name, x in want.items()}
    got = outputs_and_gradients(make_function(implementation), inputs, cotangents, dtype)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert set(got) == set(want)
    for name, error in errors.items():
        # A few sums of very many terms may all but cancel, which the rounding of the terms does not.
        tolerance = TOLERANCE[dtype] * (4 if want[name].size < FEW else 1)
        assert error < tolerance, f"{name}: relative error {error:.1e}"
    for name, value in inputs.items():
        assert got[f"d_{name}"].dtype == jnp.dtype(dtype), name
        assert got[f"d_{name}"].shape == np.shape(value), name


def assert_close_to_xla(got, function, arrays, tolerance=1e-2) -> None:
    """Holds outputs against those of `function`, on the xla implementation, in float32 on the same values."""
    want = function(*(x.astype(jnp.float32) for x in arrays))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x.astype(jnp.float32), y) < tolerance


def out_and_gradients(function):
    """`function` of arrays, made to return its output and all gradients as well: what is compiled."""

    def both(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(out)

    return both


def temporary_bytes(function, *arguments) -> int:
    """Temporary memory of the compiled function."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


needs_libtpu = pytest.mark.skipif(
    not topology.is_available("tpu"), reason="NOT PROVEN FOR TPU: libtpu is not installed"
)
needs_cuda_plugin = pytest.mark.skipif(
    not topology.is_available("gpu"),
    reason="NOT PROVEN FOR GPU: the CUDA plugin of JAX is not installed (pip install 'jax[cuda13]')",
)


def compile_with_gradients(chip: str, function, inputs: dict) -> jax.stages.Compiled:
    """Compiles `function(**inputs)`, one array, and its gradient in every input for an absent chip."""

    def both(inputs):
        out, pull = jax.vjp(lambda inputs: function(**inputs), inputs)
        return out, pull(jnp.ones_like(out))

    return topology.compile_for(chip, both, inputs)
