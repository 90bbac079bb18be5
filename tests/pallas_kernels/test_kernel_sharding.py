"""The ops on a mesh: partitioned by the compiler, and under `jax.shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from proof import relative_error

from pallas_kernels import attention, grouped_matmul, linear_attention


@pytest.fixture
def mesh():
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def with_gradients(op, **options):
    def function(q, k, v, d_out):
        out, pull = jax.vjp(lambda *x: op(*x, **options), q, k, v)
        return out, *pull(d_out)

    return function


def random_arrays(rng, kv_heads):
    # 8 x 8 heads make tiles of 64, so that there are several.
    shapes = [(8, 150, 8, 4), (8, 150, kv_heads, 4), (8, 150, kv_heads, 4), (8, 150, 8, 4)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


OPS = {
    "attention": (attention, 8),
    "attention with grouped heads": (attention, 2),
    "linear_attention": (linear_attention, 8),
}


def segments(rng):
    return jnp.asarray(np.sort(rng.integers(0, 4, (8, 150)), axis=1), jnp.int32)


@pytest.mark.parametrize("name", OPS)
def test_the_compiler_splits_batch_and_heads_without_communication(rng, mesh, name):
    op, kv_heads = OPS[name]
    arrays, segment_ids = random_arrays(rng, kv_heads), segments(rng)
    options = {"chunk_size": 64} if op is linear_attention else {"window": 40}

    def function(arrays, segment_ids):
        return with_gradients(op, segment_ids=segment_ids, **options)(*arrays)

    want = jax.jit(function)(arrays, segment_ids)
    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    compiled = jax.jit(function, in_shardings=(heads, rows), out_shardings=heads).lower(
        arrays, segment_ids
    )
    compiled = compiled.compile()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in compiled.as_text(), collective
    got = compiled(jax.device_put(arrays, heads), jax.device_put(segment_ids, rows))
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("name", OPS)
def test_under_shard_map(rng, mesh, name):
    op, kv_heads = OPS[name]
    arrays, segment_ids = random_arrays(rng, kv_heads), segments(rng)
    heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data")

    def loss(sharded):
        def function(q, k, v, d_out):
            out = sharded(q, k, v, segment_ids)
            return jnp.sum(out * d_out), out

        return jax.jit(jax.grad(function, argnums=(0, 1, 2), has_aux=True))

    def plain(q, k, v, segment_ids):
        return op(q, k, v, segment_ids=segment_ids)

    sharded = jax.shard_map(plain, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads)
    want, got = loss(plain)(*arrays), loss(sharded)(*arrays)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 1e-6


def test_keys_shared_by_all_devices_have_their_gradient_summed(rng, mesh):
    q, k, v, d_out = random_arrays(rng, kv_heads=1)
    heads, shared = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(heads, shared, shared), out_specs=heads)
    want = jax.jit(with_gradients(attention))(q, k, v, d_out)
    got = jax.jit(with_gradients(sharded))(q, k, v, d_out)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-6


def test_grouped_matmul_under_shard_map_with_shared_matrices(rng, mesh):
    lhs = jnp.asarray(rng.normal(size=(8 * 40, 6)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 6, 5)), jnp.float32)
    d_out = jnp.asarray(rng.normal(size=(8 * 40, 5)), jnp.float32)
    sizes = jnp.asarray(rng.multinomial(35, [0.2, 0.3, 0.5], size=8), jnp.int32)
    split = PartitionSpec(("data", "tensor"))

    def by_device(lhs, rhs, sizes):
        return jnp.concatenate(
            [grouped_matmul(lhs[40 * i :][:40], rhs, sizes[i]) for i in range(8)]
        )

    sharded = jax.shard_map(
        lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes[0]),
        mesh=mesh,
        in_specs=(split, PartitionSpec(), split),
        out_specs=split,
    )

    def gradients(function):
        def both(lhs, rhs):
            out, pull = jax.vjp(lambda x, w: function(x, w, sizes), lhs, rhs)
            return out, *pull(d_out)

        return jax.jit(both)(lhs, rhs)

    for x, y in zip(gradients(sharded), gradients(by_device), strict=True):
        assert relative_error(x, y) < 1e-6
