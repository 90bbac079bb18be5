"""What a chip holds of a program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from effjax.training.planning import memory
from pallas_kernels import topology

GIB = 2**30
needs_libtpu = pytest.mark.skipif(not topology.is_available(), reason="needs libtpu")


def matrix(columns):
    where = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct((65536, columns), jnp.bfloat16, sharding=where)


def product(x):
    return x.T @ x


@needs_libtpu
def test_temporaries_that_share_a_place_count_once():
    """The logits are gone before layers are differentiated, whose inputs were kept."""

    def loss(layers, head, x):
        x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)
        return jnp.sum(jax.nn.logsumexp((x @ head).astype(jnp.float32), axis=-1))

    where = SingleDeviceSharding(jax.devices()[0])
    layers, head, x = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
        for shape in ((16, 256, 256), (256, 4096), (16384, 256))
    )
    compiled = topology.compile_for("v5e:1x1", jax.grad(loss, argnums=(0, 1)), layers, head, x)
    found = memory.of_program(compiled, (layers, head), None, capacity=16 * GIB)
    assert found.parameters == 2 * (16 * 256 + 4096) * 256
    assert found.total == found.parameters + found.other + found.temporaries
    parts = compiled.memory_analysis()
    if not hasattr(parts, "total_allocation_bytes"):
        pytest.skip("jaxlib before 0.12 does not say what is allocated")
    assert parts.temp_size_in_bytes > 2 * 2**27  # logits, and the inputs of layers
    assert 2**27 < found.temporaries < 0.9 * parts.temp_size_in_bytes


@needs_libtpu
def test_a_program_that_is_refused_takes_what_the_compiler_says():
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        topology.compile_for("v5e:1x1", product, matrix(65536))
    found = memory.of_failure(refused.value, matrix(65536), None)
    assert found == memory.Memory(8 * GIB, 0, 0, 8 * GIB, 16 * GIB, capacity=15.75 * GIB)
    assert not found.fits


def test_as_it_was_said_by_older_compilers():
    error = RuntimeError(
        "Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm. Exceeded"
    )
    found = memory.of_failure(error, matrix(65536), None)
    assert found == memory.Memory(8 * GIB, 0, 0, 9.5 * GIB, 17.5 * GIB, capacity=15.75 * GIB)
    assert memory.of_failure(RuntimeError("something else"), matrix(65536), None) is None
