"""The GPU kernel of decode_attention: interpreted against the reference in float64, compiled for an absent GPU.

No test here runs on a GPU. The caches are NaN behind a row's length, and pages that no query sees are not there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decode_attention
from gpu_proof import detect_races, refused_for_the_chip
from jax.sharding import PartitionSpec
from proof import needs_cuda_plugin, rest_slow
from test_decode_attention import arguments, assert_close, cast, in_float64, paged, random_inputs

from pallas_kernels import decode_attention, topology
from pallas_kernels.decode_attention import IMPLEMENTATIONS, gpu, gpu_parts
from pallas_kernels.decode_attention.gpu_parts import num_parts

# The rows of shared memory that the group of queries leaves unused are NaN, of which NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def small_chip(monkeypatch):
    """Tiles of 128 keys and few parts: the interpreter takes its time by blocks and tiles, whatever they hold."""
    monkeypatch.setattr(gpu_parts, "HALF_TILES", {256: 64})
    monkeypatch.setattr(gpu_parts, "MULTIPROCESSORS", 4)


def check(rng, monkeypatch, case, implementation="gpu_interpret"):
    """Holds a case, (lengths, Tq, H, Hkv, S, page_size, options), against float64 on the same values."""
    lengths, num_queries, heads, kv_heads, size, page_size, options = case
    sizes = {"size": size, "dim": 16, "value_dim": 32}
    q, k, v, lengths = random_inputs(rng, lengths, num_queries, heads, kv_heads, **sizes)
    rounded = [np.asarray(x, np.float64) for x in cast((q, k, v), "bfloat16")]
    want = in_float64(*rounded, lengths, **options)
    table = None
    if page_size is not None:
        monkeypatch.setattr(test_decode_attention, "PAGE", page_size)
        window = options.get("window")
        first = 0 if window is None else lengths[:, None] - num_queries - window + 1
        k, v, table = paged(rng, k, v, lengths, first)
    function = functools.partial(
        decode_attention, return_lse=True, implementation=implementation, **options
    )
    got = jax.jit(function)(*cast((q, k, v), "bfloat16"), jnp.asarray(lengths), page_table=table)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    assert_close(got, want, "bfloat16")


# Lengths, Tq, H, Hkv, S, page_size, options.
CASES = {
    "one query, grouped heads": ([0, 400], 1, 4, 2, 400, None, {}),
    "a cache shorter than a tile": ([1, 41], 1, 2, 1, 41, None, {}),
    "the tile at the end begins early": ([130, 200], 3, 2, 1, 200, None, {}),
    "window": ([300], 2, 2, 1, 304, None, {"window": 140}),
    "window of one": ([1, 129], 1, 2, 2, 136, None, {"window": 1}),
    "soft cap and scale": ([70], 1, 2, 2, 128, None, {"logits_soft_cap": 2.0, "scale": -0.3}),
    "more queries than a block has rows": ([130], 17, 4, 1, 136, None, {}),
    "more queries than tokens": ([2], 4, 1, 1, 64, None, {}),
    "a few small pages": ([11], 1, 1, 1, 24, 8, {}),
    "small pages": ([0, 333], 1, 2, 1, 400, 16, {}),
    "small pages and window": ([2, 290], 3, 2, 1, 300, 8, {"window": 100}),
    "pages of half a tile": ([100], 1, 2, 2, 192, 64, {}),
    "pages of several tiles": ([300], 2, 2, 1, 512, 256, {"window": 30}),
}


@pytest.mark.parametrize(
    "case",
    rest_slow(
        CASES,
        "one query, grouped heads",
        "the tile at the end begins early",
        "window",
        "small pages and window",
        "pages of several tiles",
    ),
)
def test_equals_float64(rng, monkeypatch, case):
    check(rng, monkeypatch, CASES[case])


@pytest.mark.parametrize("page_size", [None, 32])
def test_no_race_with_more_tiles_than_a_ring_holds(rng, monkeypatch, page_size):
    monkeypatch.setattr(gpu_parts, "MULTIPROCESSORS", 1)
    detect_races(monkeypatch, IMPLEMENTATIONS, gpu.decode_attention)
    check(rng, monkeypatch, ([420], 2, 2, 1, 424, page_size, {}), "gpu_checked")


def test_under_vmap(rng):
    q, k, v, lengths = random_inputs(rng, [7, 100], 2, 2, 1, size=104, dim=16, value_dim=16)
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    arrays = [*cast((q, k, v), "bfloat16"), jnp.asarray(lengths)]
    function = functools.partial(decode_attention, window=30, implementation="gpu_interpret")
    got = jax.jit(jax.vmap(function))(*(x[:, None] for x in arrays))[:, 0]
    want = decode_attention(*cast(arrays[:3], "float32"), lengths, window=30)
    assert_close([got.astype(jnp.float32)], [want], "bfloat16")


def test_every_tile_is_in_one_part(rng):
    for _ in range(50):
        size = 8 * int(rng.integers(10, 200))
        window = int(rng.integers(1, 300)) if rng.random() < 0.5 else None
        num_queries = int(rng.integers(1, 5))
        shapes = [
            jax.ShapeDtypeStruct((2, n, heads, 16), jnp.bfloat16)
            for n, heads in ((num_queries, 4), (size, 2), (size, 2))
        ]
        spec = gpu_parts.make_spec(
            *shapes, None, window=window, scale=1.0, logits_soft_cap=None, interpret=None
        )
        length = int(rng.integers(0, size + 1))
        first = max(length - num_queries - window + 1, 0) if window else 0
        covered = np.zeros(size + spec.keys, int)
        for index in range(spec.parts):
            part = gpu_parts.part_of(spec, jnp.int32(length), jnp.int32(index))
            covered[part.start : part.start + part.num_tiles * spec.keys] += 1
            assert part.start % 8 == 0
        assert np.all(covered[first:length] == 1)
        assert covered.sum() < length - first + 8 + spec.keys


def test_parts_occupy_the_chip(monkeypatch):
    monkeypatch.setattr(gpu_parts, "MULTIPROCESSORS", 132)
    # A batch that fills the chip is not divided; a single row is, down to its tiles; 100 of 132 leave a quarter idle.
    assert num_parts(blocks=132, tiles=64) == 1
    assert num_parts(blocks=1, tiles=64) == 64
    assert num_parts(blocks=64, tiles=64) == 2
    assert num_parts(blocks=1000, tiles=1) == 1
    assert 1 < num_parts(blocks=100, tiles=64) < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "dtype float32; it takes bfloat16"),
        ({"dtype": "float16"}, "dtype float16; it takes bfloat16"),
        ({"dim": 144}, "head_dim 144: it would have to copy the cache; without it takes multiples"),
        ({"dim": 40}, "head_dim 40: it would have to copy the cache; without it takes multiples"),
        ({"size": 300}, "a cache of 300 tokens: it would have to copy it; without it takes mult"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(changes, message):
    values = arguments(**({"dim": 16, "dtype": jnp.bfloat16} | changes))
    with pytest.raises(ValueError, match=f"implementation='gpu_interpret' cannot: {message}"):
        decode_attention(**values, implementation="gpu_interpret")


def test_pages_that_are_no_part_of_a_tile_are_refused():
    values = arguments(dim=16, dtype=jnp.bfloat16, size=48) | {"page_table": np.zeros((2, 3), int)}
    with pytest.raises(ValueError, match="pages of 48 keys; it takes pages of 8, 16, 32, 64 and"):
        decode_attention(**values, implementation="gpu_interpret")


def test_a_gpu_that_is_no_hopper_is_refused():
    function = functools.partial(decode_attention, implementation="gpu")
    with refused_for_the_chip():
        jax.eval_shape(function, **arguments(dim=16, dtype=jnp.bfloat16))


def shapes(batch, num_queries, heads, kv_heads, size, dim, page_size=None):
    """q, k_cache, v_cache, lengths and page_table."""
    cache = (batch, size, kv_heads, dim)
    table = None
    if page_size is not None:
        cache = (batch * size // page_size, page_size, kv_heads, dim)
        table = jax.ShapeDtypeStruct((batch, size // page_size), jnp.int32)
    cache = jax.ShapeDtypeStruct(cache, jnp.bfloat16)
    q = jax.ShapeDtypeStruct((batch, num_queries, heads, dim), jnp.bfloat16)
    return q, cache, cache, jax.ShapeDtypeStruct((batch,), jnp.int32), table


def by_position(**options):
    def function(q, k_cache, v_cache, lengths, table):
        return decode_attention(
            q, k_cache, v_cache, lengths, page_table=table, **options, return_lse=True
        )

    return function


# Sizes as `shapes` takes them, and options.
COMPILED = {
    "grouped heads": ((8, 1, 32, 8, 8192, 128), {}),
    "pages and soft cap": ((8, 1, 32, 8, 8192, 64, 16), {"logits_soft_cap": 30.0}),
    "several queries, window, smallest pages": ((2, 20, 8, 2, 16384, 128, 8), {"window": 1024}),
    "one long row": ((1, 1, 16, 1, 65536, 128), {}),
    "odd sizes": ((2, 3, 8, 2, 1000, 80), {"window": 100}),
    "narrow heads": ((2, 1, 4, 2, 1024, 16), {}),
}


@needs_cuda_plugin
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_gpu_without_a_copy_of_the_cache(monkeypatch, case):
    monkeypatch.undo()
    sizes, options = COMPILED[case]
    arrays = shapes(*sizes)
    compiled = topology.compile_for("h100", by_position(**options, implementation="gpu"), *arrays)
    assert "decode_attention_mosaic_gpu" in compiled.as_text()
    # Also: the parts' softmaxes take little beside the cache.
    cache_bytes = 2 * 2 * arrays[1].size
    assert compiled.memory_analysis().temp_size_in_bytes < max(cache_bytes / 4, 2**20)


@needs_cuda_plugin
def test_compiles_for_gpus_under_shard_map_and_vmap(monkeypatch):
    """Each device has heads of its own."""
    monkeypatch.undo()
    rows, heads = PartitionSpec(), PartitionSpec(None, None, None, "data")
    function = jax.shard_map(
        jax.vmap(lambda *arrays: by_position(implementation="gpu")(*arrays, None)[0]),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
    )
    *arrays, _ = shapes(2, 1, 8, 2, 512, 64)
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in arrays]
    text = topology.compile_for("h100:1x2", function, *stacked).as_text()
    assert "decode_attention_mosaic_gpu" in text


@needs_cuda_plugin
def test_the_kernel_has_to_be_named():
    text = topology.compile_for("h100", by_position(), *shapes(1, 1, 2, 1, 256, 64)).as_text()
    assert "mosaic_gpu" not in text
