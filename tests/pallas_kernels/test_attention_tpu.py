"""The TPU kernels of attention: interpreted against the reference in float64, compiled for chips that are not here."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from proof import (
    assert_close,
    by_chip,
    compile_with_gradients,
    needs_libtpu,
    relative_error,
    rest_slow,
)
from test_attention_kernel import random_inputs, random_segments

from pallas_kernels import attention
from pallas_kernels.attention import IMPLEMENTATIONS, blocks, tpu, tpu_backward, visits
from pallas_kernels.attention.mask import PADDING, Mask, Tokens
from pallas_kernels.blocks import decided_by
from pallas_kernels.dispatch import Implementation


@pytest.fixture(autouse=True)
def short_blocks():
    """The shortest tiles, so that a few hundred tokens are several."""
    with decided_by(lambda choice: {"queries": 128, "keys": 128}):
        yield


CASES = {
    "causal, grouped heads": ((300, 300, 4, 2), {}),
    "window and segments": ((300, 300, 2, 2), {"window": 65, "segments": True}),
    "window": ((300, 300, 2, 1), {"window": 150}),
    "bidirectional, soft cap": ((150, 270, 2, 2), {"causal": False, "logits_soft_cap": 2.0}),
    "bidirectional, segments": ((130, 270, 2, 2), {"causal": False, "segments": True}),
    "more queries than keys": ((400, 140, 4, 1), {}),
    "more keys than queries": ((140, 400, 2, 2), {"window": 200, "scale": 0.3}),
    "positions in any order": ((270, 140, 2, 1), {"positions": True, "segments": True}),
    "positions without segments": ((140, 270, 2, 2), {"positions": True, "window": 40}),
    "one query": ((1, 130, 4, 2), {"segments": True}),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    rest_slow(
        list(itertools.product(CASES, ["float32", "bfloat16"])),
        ("causal, grouped heads", "float32"),
        ("causal, grouped heads", "bfloat16"),
        ("window and segments", "float32"),
        ("positions in any order", "float32"),
        ("one query", "float32"),
    ),
)
def test_kernel_with_every_gradient_equals_float64(rng, case, dtype):
    (num_queries, num_keys, heads, kv_heads), options = CASES[case]
    inputs, cotangents = random_inputs(rng, 2, num_queries, num_keys, heads, kv_heads)
    options = dict(options)
    if options.pop("segments", False):
        queries, keys = (random_segments(rng, 2, length) for length in (num_queries, num_keys))
        options["segment_ids"] = (np.ones_like(queries) if num_queries == 1 else queries, keys)
    if options.pop("positions", False):
        options["positions"] = tuple(
            rng.integers(0, 100, (2, length)) for length in (num_queries, num_keys)
        )

    def make_function(implementation):
        def function(q, k, v):
            out, lse = attention(q, k, v, **options, return_lse=True, implementation=implementation)
            return {"out": out, "lse": lse}

        return function

    assert_close(make_function, inputs, cotangents, dtype, "tpu_interpret")


# [B, T, H, Hkv, D, Dv], queries and keys of a tile, dtype and options.
LAYOUTS = {
    "two heads of 64 in a block, cut tiles": ((2, 300, 2, 2, 64, 64), (256, 256), "float32", {}),
    "pairs in a program": ((1, 150, 12, 12, 64, 64), (128, 128), "bfloat16", {}),
    "grouped heads change their half": ((1, 300, 6, 2, 40, 64), (128, 256), "float32", {}),
    "odd heads of 64": ((1, 140, 9, 3, 64, 64), (128, 128), "float32", {"window": 100}),
    "a loop over heads": ((1, 270, 12, 2, 64, 24), (256, 256), "float32", {"causal": False}),
    "a loop over blocks": ((1, 300, 8, 1, 128, 128), (256, 256), "bfloat16", {}),
    "heads of 80": ((1, 140, 4, 4, 80, 80), (128, 128), "float32", {}),
    "heads of 128 abreast, cut tiles": ((1, 512, 2, 2, 128, 128), (256, 256), "float32", {}),
    "heads of 256, values of 64": ((1, 140, 4, 2, 256, 64), (128, 128), "float32", {}),
}


@pytest.mark.parametrize(
    "case",
    rest_slow(
        list(LAYOUTS),
        "two heads of 64 in a block, cut tiles",
        "grouped heads change their half",
    ),
)
def test_heads_of_any_width_and_number_side_by_side(rng, case):
    (batch, length, heads, kv_heads, *dims), tile, dtype, options = LAYOUTS[case]
    inputs, cotangents = random_inputs(rng, batch, length, length, heads, kv_heads, *dims)
    inputs["q"] /= np.sqrt(dims[0])

    def make_function(implementation):
        def function(q, k, v):
            out, lse = attention(
                q, k, v, scale=1, **options, return_lse=True, implementation=implementation
            )
            return {"out": out, "lse": lse}

        return function

    with decided_by(lambda choice: dict(zip(("queries", "keys"), tile, strict=True))):
        assert_close(make_function, inputs, cotangents, dtype, "tpu_interpret")


def with_gradients(options, implementation="tpu_interpret"):
    """A function of q, k, v: out, lse and the gradients of a sum over both, in which every row counts."""

    def loss(q, k, v):
        out, lse = attention(q, k, v, **options, return_lse=True, implementation=implementation)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(seen)), (out, lse)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def random_arrays(rng, *lengths):
    inputs, _ = random_inputs(rng, *lengths)
    return [jnp.asarray(x, jnp.float32) for x in inputs.values()]


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 5e-6


def test_no_race_and_no_read_of_what_was_not_written(rng, monkeypatch):
    """Memory starts as NaN, and two cores visit the parallel axes of the grid in any order."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=1)
    checked = Implementation(functools.partial(tpu.attention, interpret=params), automatic=False)
    monkeypatch.setitem(IMPLEMENTATIONS, "tpu_checked", checked)
    arrays = random_arrays(rng, 1, 140, 260, 4, 2)
    got, want = (
        jax.jit(with_gradients({"window": 200}, name))(*arrays) for name in ("tpu_checked", "xla")
    )
    assert_same(got, want)


@pytest.mark.slow
def test_chunks_of_queries_have_the_same_gradients(rng, monkeypatch):
    arrays = random_arrays(rng, 1, 270, 400, 2, 1)
    segments = tuple(random_segments(rng, 1, length) for length in (270, 400))
    options = {"window": 200, "segment_ids": segments}
    want = jax.jit(with_gradients(options))(*arrays)
    monkeypatch.setattr(tpu_backward, "VMEM_LIMIT", 0)  # a chunk is one tile
    assert_same(jax.jit(with_gradients(options))(*arrays), want)


def test_rows_that_see_nothing_give_zero_and_finite_gradients(rng):
    arrays = random_arrays(rng, 1, 260, 260, 2, 1)
    segment_ids = jnp.asarray(np.arange(260) // 130, jnp.int32)[None]  # the first half is padding
    gradients, (out, lse) = jax.jit(with_gradients({"segment_ids": segment_ids}))(*arrays)
    assert np.all(out[:, :130] == 0) and np.all(np.isneginf(lse[:, :130]))
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(lse[:, 130:]))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[:, :130] == 0) and np.any(gradient[:, 130:] != 0)


def test_tiles_outside_of_the_mask_are_never_visited(rng):
    """What a tile multiplies by 0 would still turn into NaN."""
    q, k, v = random_arrays(rng, 1, 128, 512, 2, 2)
    # The first query sees keys 355..384.
    k, v = k.at[:, :256].set(jnp.nan), v.at[:, :256].set(jnp.nan)
    (dq, dk, dv), (out, _) = jax.jit(with_gradients({"window": 30}))(q, k, v)
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(dq))
    assert np.all(dk[:, :256] == 0) and np.all(dv[:, :256] == 0)


def random_mask(rng, of=1) -> tuple[Mask, blocks.Blocks, dict]:
    """A mask, lengths of tiles, multiples of `of`, and which logits of each are allowed, padded keys included."""
    num_queries, num_keys = rng.integers(1, 40 if of == 1 else 4 * of, 2).tolist()
    causal = rng.random() < 0.8
    window = (
        int(rng.integers(1, 30 if of == 1 else 3 * of)) if causal and rng.random() < 0.6 else None
    )
    mask = Mask(num_queries, num_keys, causal, window, is_ordered=True)
    lengths = blocks.Blocks(*(of * rng.integers(1, 9 if of == 1 else 3, 2)).tolist())
    query, key = np.mgrid[:num_queries, : -(-num_keys // lengths.keys) * lengths.keys]
    keys = Tokens(np.where(key < num_keys, key, PADDING), None)
    allowed = mask.allowed(Tokens(query + mask.offset, None), keys)
    tiles = {
        (i // lengths.queries, j // lengths.keys): allowed[
            i : i + lengths.queries, j : j + lengths.keys
        ]
        for i in range(0, num_queries, lengths.queries)
        for j in range(0, num_keys, lengths.keys)
    }
    return mask, lengths, tiles


@pytest.mark.parametrize(("order", "side"), [(visits.by_queries, 0), (visits.by_keys, 1)])
def test_visits_are_the_tiles_that_hold_something(rng, order, side):
    for _ in range(100):
        mask, lengths, tiles = random_mask(rng)
        listed = np.stack(order(mask, lengths, needs_mask=False), axis=1)
        seen = {(i, j): kind for i, j, kind in listed.tolist() if not kind & visits.EMPTY}
        assert set(seen) == {at for at, allowed in tiles.items() if allowed.any()}
        for at, kind in seen.items():
            assert bool(kind & visits.MASKED) == (not tiles[at].all())
        # The visits to an output block are consecutive, from FIRST to LAST, and there is one at least.
        outer, kind = listed[:, side], listed[:, 2]
        changes = np.diff(outer, prepend=-1, append=-1) != 0
        assert np.all(np.diff(outer) >= 0) and set(outer) == {at[side] for at in tiles}
        np.testing.assert_array_equal(kind & visits.FIRST != 0, changes[:-1])
        np.testing.assert_array_equal(kind & visits.LAST != 0, changes[1:])
        new = [i for i, _, kind in listed.tolist() if kind & visits.NEW]
        assert sorted(new) == (sorted({i for i, _ in seen}) if side else [])


def test_a_tile_is_cut_where_a_quarter_of_it_is_empty(rng):
    for _ in range(20):
        mask, lengths, tiles = random_mask(rng, of=256)
        query, key, kinds = visits.by_queries(mask, lengths, needs_mask=False)
        for i, j, kind in zip(query.tolist(), key.tolist(), kinds.tolist(), strict=True):
            if kind & visits.CUT:
                assert kind & visits.MASKED
                assert not tiles[i, j][: lengths.queries // 2, lengths.keys // 2 :].any()
    causal = Mask(1024, 1024, causal=True, window=None, is_ordered=True)
    for order in (visits.by_queries, visits.by_keys):
        found = order(causal, blocks.Blocks(512, 512), needs_mask=True)
        np.testing.assert_array_equal(found.kind & visits.CUT != 0, found.query == found.key)


def test_under_vmap_and_remat(rng):
    arrays = [jnp.stack([x, x[:, ::-1]]) for x in random_arrays(rng, 1, 140, 140, 2, 1)]

    def make_loss(implementation):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention(q, k, v, window=30, implementation=implementation)))

        return loss

    def gradients(loss):
        return jax.jit(jax.vmap(jax.grad(jax.remat(loss), argnums=(0, 1, 2))))(*arrays)

    assert_same(gradients(make_loss("tpu_interpret")), gradients(make_loss("xla")))


def test_under_shard_map(rng):
    """The devices along "tensor" share the key head, whose gradient is the sum over them."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays = random_arrays(rng, 4, 140, 140, 4, 1)
    segment_ids = jnp.asarray(random_segments(rng, 4, 140), jnp.int32)
    rows, heads = PartitionSpec("data"), PartitionSpec("data", None, "tensor")

    def gradients(implementation, shard):
        def function(q, k, v, segment_ids):
            return attention(q, k, v, segment_ids=segment_ids, implementation=implementation)

        function = shard(function)

        def both(*arrays):
            out, pull = jax.vjp(lambda *x: function(*x, segment_ids), *arrays)
            return out, pull(jnp.sin(out))

        return jax.jit(both)(*arrays)

    split = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(heads, rows, rows, rows), out_specs=heads
    )
    assert_same(gradients("tpu_interpret", split), gradients("xla", lambda function: function))


@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "message"),
    [
        ("float64", 2, 8, "dtype float64; it takes bfloat16 and float32"),
        ("float32", 2, 513, "head_dim 513; it takes up to 512"),
        ("float32", 17, 8, "17 query heads for a key head; it takes up to 16 of 8 float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name_and_otherwise_passed_over(
    dtype, heads, dim, message
):
    with jax.enable_x64(True):
        q, k = (jnp.ones((1, 4, h, dim), dtype) for h in (heads, 1))
        with pytest.raises(ValueError, match=f"implementation='tpu_interpret' cannot: {message}"):
            attention(q, k, k, implementation="tpu_interpret")
        assert attention(q, k, k).dtype == dtype


# Chip, [B, T, H, Hkv, D], dtype and options.
COMPILED = {
    "grouped heads, v5e": ("v5e", (1, 4096, 8, 2, 128), "bfloat16", {}),
    "grouped heads, v6e": ("v6e", (1, 2048, 8, 2, 128), "bfloat16", {}),
    "window, v5e": ("v5e", (2, 2048, 4, 4, 64), "bfloat16", {"window": 512, "segments": True}),
    "window, v6e": ("v6e", (2, 2048, 4, 4, 64), "bfloat16", {"window": 512, "segments": True}),
    "both directions": ("v5e", (1, 1500, 2, 2, 256), "bfloat16", {"causal": False}),
    "float32, soft cap": ("v5e", (1, 700, 4, 4, 128), "float32", {"logits_soft_cap": 50.0}),
    "largest group": ("v5e", (1, 300, 32, 1, 128), "bfloat16", {"segments": True}),
    "largest heads": ("v6e", (1, 300, 4, 1, 512), "float32", {}),
}


@needs_libtpu
@pytest.mark.parametrize("case", by_chip(COMPILED))
def test_compiles_for_tpu_with_gradients_and_is_the_default_there(case):
    chip, (batch, length, heads, kv_heads, dim), dtype, options = COMPILED[case]
    options = dict(options)
    has_segments = options.pop("segments", False)
    inputs = {
        name: jax.ShapeDtypeStruct((batch, length, count, dim), dtype)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }

    def function(q, k, v):
        segment_ids = jnp.ones(q.shape[:2], jnp.int32) if has_segments else None
        return attention(q, k, v, segment_ids=segment_ids, **options)

    compiled = compile_with_gradients(chip, function, inputs).as_text()
    assert "attention_forward" in compiled and "attention_backward" in compiled
