"""decode_attention: against NumPy loops, then the fast forms against the reference in float64. It has no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from proof import TOLERANCE, by_chip, needs_libtpu, relative_error, temporary_bytes
from test_attention_kernel import by_loops

from pallas_kernels import attention, decode_attention, topology
from pallas_kernels.decode_attention import IMPLEMENTATIONS, merge, tpu, xla
from pallas_kernels.dispatch import Implementation

PAGE = 8
# Behind a row's length, where nothing may be read.
NO_PAGE = 10**6


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """The shortest blocks, so that a cache of a hundred tokens is several."""
    monkeypatch.setattr(tpu, "VISIT_BYTES", 0)
    monkeypatch.setitem(xla.BLOCK_ENTRIES, "cpu", 0)


def random_inputs(rng, lengths, num_queries, heads, kv_heads, size=100, dim=8, value_dim=6):
    """q, k_cache, v_cache and lengths; the caches are NaN behind a row's length."""
    batch = len(lengths)
    q = 2 * rng.normal(size=(batch, num_queries, heads, dim))
    k = 2 * rng.normal(size=(batch, size, kv_heads, dim))
    v = rng.normal(size=(batch, size, kv_heads, value_dim))
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = np.nan
    return q, k, v, np.array(lengths, np.int32)


def paged(rng, k, v, lengths, first=0):
    """The caches as shuffled pages among others, and their table, which is wrong where no query of a row looks."""
    batch, size, *_ = k.shape
    max_pages = -(-size // PAGE)
    spare = 3
    place = rng.permutation(batch * max_pages + spare)[: batch * max_pages]
    table = place.reshape(batch, max_pages)
    pools = []
    for x in (k, v):
        pages = np.pad(x, [(0, 0), (0, -size % PAGE), (0, 0), (0, 0)])
        pool = np.full((batch * max_pages + spare, PAGE, *x.shape[2:]), np.nan)
        pool[place] = pages.reshape(-1, PAGE, *x.shape[2:])
        pools.append(pool)
    page = np.arange(max_pages)
    used = (page * PAGE < lengths[:, None]) & ((page + 1) * PAGE > first)
    return *pools, np.where(used, table, NO_PAGE).astype(np.int32)


def cast(arrays, dtype):
    return [jnp.asarray(x, dtype) for x in arrays]


def in_float64(q, k, v, lengths, **options):
    """The reference's out and lse on the same values."""
    with jax.enable_x64(True):
        arrays = cast((q, k, v), jnp.float64)
        function = functools.partial(
            decode_attention, return_lse=True, implementation="reference", **options
        )
        return [np.asarray(x) for x in jax.jit(function)(*arrays, jnp.asarray(lengths))]


def assert_close(got, want, dtype="float32"):
    errors = [relative_error(x, y) for x, y in zip(got, want, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize(
    ("window", "soft_cap", "scale"), [(None, None, None), (5, None, 0.7), (None, 1.5, None)]
)
def test_reference_equals_loops_over_rows(rng, is_paged, window, soft_cap, scale):
    lengths, num_queries, size = [0, 2, 17, 30], 3, 30
    q, k, v, lengths = random_inputs(rng, lengths, num_queries, 4, 2, size)
    positions = lengths[:, None] - num_queries + np.arange(num_queries)
    want = by_loops(
        q,
        np.nan_to_num(k),
        np.nan_to_num(v),
        causal=True,
        window=window,
        segments=None,
        positions=(positions, np.broadcast_to(np.arange(size), (len(lengths), size))),
        scale=8**-0.5 if scale is None else scale,
        soft_cap=soft_cap,
    )
    options = {"window": window, "logits_soft_cap": soft_cap, "scale": scale}
    if is_paged:
        k, v, options["page_table"] = paged(rng, k, v, lengths)
    got = in_float64(q, k, v, lengths, **options)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 1e-12


# Lengths, Tq, H, Hkv, options.
CASES = {
    "one query, grouped heads": ([0, 1, 57, 100], 1, 4, 2, {}),
    "several queries": ([2, 16, 100], 3, 4, 4, {}),
    "window": ([0, 3, 40, 100], 2, 8, 1, {"window": 20}),
    "soft cap and scale": ([33, 90], 1, 2, 2, {"logits_soft_cap": 2.0, "scale": 0.3}),
    "window of one": ([1, 64], 1, 8, 8, {"window": 1}),
}


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret"])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES] + [("window", "bfloat16")],
)
def test_equals_float64(rng, case, dtype, is_paged, implementation):
    *shape, options = CASES[case]
    q, k, v, lengths = random_inputs(rng, *shape)
    rounded = [np.asarray(x, np.float64) for x in cast((q, k, v), dtype)]
    want = in_float64(*rounded, lengths, **options)
    if is_paged:
        k, v, table = paged(rng, k, v, lengths)
        options = options | {"page_table": table}
    function = functools.partial(
        decode_attention, return_lse=True, implementation=implementation, **options
    )
    got = jax.jit(function)(*cast((q, k, v), dtype), lengths)
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    assert_close(got, want, dtype)
    sees_nothing = np.arange(-q.shape[1], 0) + lengths[:, None] < 0
    assert np.all(np.asarray(got[0])[sees_nothing] == 0)
    assert np.all(np.isneginf(np.asarray(got[1])[sees_nothing]))


@pytest.mark.parametrize("case", list(CASES))
def test_several_rows_of_short_caches_a_visit(rng, monkeypatch, case):
    monkeypatch.undo()
    *shape, options = CASES[case]
    q, k, v, lengths = random_inputs(rng, *shape)
    visits = []
    make_spec = tpu._make_spec

    def seen(*args):
        visits.append(make_spec(*args))
        return visits[-1]

    monkeypatch.setattr(tpu, "_make_spec", seen)
    got = decode_attention(
        *cast((q, k, v), jnp.float32),
        lengths,
        return_lse=True,
        implementation="tpu_interpret",
        **options,
    )
    assert_close(got, in_float64(q, k, v, lengths, **options))
    assert {(spec.batch_rows, spec.visits) for spec in visits} == {(len(lengths), 1)}


def test_several_pages_a_visit(rng, monkeypatch):
    monkeypatch.undo()
    q, k, v, lengths = random_inputs(rng, [5, 41, 100], 2, 4, 2)
    want = in_float64(q, k, v, lengths)
    k, v, table = paged(rng, k, v, lengths)
    monkeypatch.setattr(tpu, "MOST_PAGES", 3)
    for implementation in ("xla", "tpu_interpret"):
        got = decode_attention(
            *cast((q, k, v), jnp.float32),
            lengths,
            page_table=table,
            return_lse=True,
            implementation=implementation,
        )
        assert_close(got, want)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("is_paged", [False, True])
def test_cores_share_a_cache_without_races_or_reading_what_no_query_sees(
    rng, monkeypatch, is_paged, window
):
    """The interpreter raises on a page that is not there, and gives NaN for what was not written."""
    monkeypatch.setattr(tpu, "num_cores", lambda device_kind: 2)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=1)
    checked = Implementation(
        functools.partial(tpu.decode_attention, interpret=params), automatic=False
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "tpu_checked", checked)
    # Three rows are no multiple of two cores. A cache of 96 is whole blocks.
    q, k, v, lengths = random_inputs(rng, [0, 43, 96], 2, 4, 2, size=96)
    want = in_float64(q, k, v, lengths, window=window)
    table = None
    if is_paged:
        first = 0 if window is None else lengths[:, None] - 2 - window + 1
        k, v, table = paged(rng, k, v, lengths, first)
    got = decode_attention(
        *cast((q, k, v), jnp.float32),
        lengths,
        page_table=table,
        window=window,
        return_lse=True,
        implementation="tpu_checked",
    )
    assert_close(got, want)


@pytest.mark.parametrize(
    ("lengths", "window", "blocks"),
    # Blocks of 16 tokens; a window of 20 can touch three.
    [([0, 0], None, 0), ([3, 33], None, 3), ([100, 16], None, 7), ([100, 96], 20, 2)],
)
def test_xla_reads_the_blocks_that_some_row_needs(rng, monkeypatch, lengths, window, blocks):
    read = []
    slice_of_time = xla._slice

    def counted(x, start, length):
        jax.debug.callback(lambda: read.append(length))
        return slice_of_time(x, start, length)

    monkeypatch.setattr(xla, "_slice", counted)
    q, k, v, lengths = random_inputs(rng, lengths, 1, 2, 1)
    decode_attention(
        *cast((q, k, v), jnp.float32), lengths, window=window, implementation="xla"
    ).block_until_ready()
    jax.effects_barrier()
    assert read == [16] * (2 * blocks)  # of k and of v


def test_xla_makes_nothing_as_large_as_the_cache(monkeypatch):
    monkeypatch.undo()
    q = jax.ShapeDtypeStruct((2, 1, 8, 64), "bfloat16")
    cache = jax.ShapeDtypeStruct((2, 65536, 2, 64), "bfloat16")
    lengths = jax.ShapeDtypeStruct((2,), "int32")
    function = functools.partial(decode_attention, implementation="xla")
    cache_bytes = 2 * cache.size * 2
    assert temporary_bytes(function, q, cache, cache, lengths) < cache_bytes / 4


def test_a_full_cache_is_attention(rng):
    q, k, v, lengths = random_inputs(rng, [50, 50], 4, 4, 2, size=50)
    arrays = cast((q, k, v), jnp.float32)
    got = decode_attention(*arrays, lengths, window=9, return_lse=True)
    assert_close(got, attention(*arrays, window=9, return_lse=True))


def test_merged_parts_are_the_whole(rng):
    q, k, v, _ = random_inputs(rng, [64], 1, 2, 2, size=64)
    arrays = cast((q, k, v), jnp.float32)
    whole = decode_attention(*arrays, jnp.array([64]), return_lse=True)
    parts = [
        decode_attention(arrays[0], *(x[:, i : i + 32] for x in arrays[1:]), n, return_lse=True)
        for i, n in ((0, jnp.array([32])), (32, jnp.array([32])), (0, jnp.array([0])))
    ]
    out, lse = (jnp.stack([part[i][:, 0] for part in parts], axis=1) for i in (0, 1))
    out, lse = merge.merge(out, lse[..., None])
    assert_close((out, lse[..., 0]), [x[:, 0] for x in whole])


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret"])
def test_under_vmap(rng, implementation):
    q, k, v, lengths = random_inputs(rng, [7, 50, 88, 100], 2, 4, 2)
    arrays = [*cast((q, k, v), jnp.float32), jnp.asarray(lengths)]
    function = functools.partial(decode_attention, window=30, implementation=implementation)
    pairs = [x.reshape(2, 2, *x.shape[1:]) for x in arrays]
    got = jax.jit(jax.vmap(function))(*pairs)
    assert_close([got.reshape(4, *got.shape[2:])], [jax.jit(function)(*arrays)])


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("tpu_interpret", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("is_paged", [False, True])
def test_under_shard_map(rng, is_paged, implementation):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, v, lengths = random_inputs(rng, [0, 1, 30, 31, 50, 77, 99, 100], 1, 4, 2)
    want = in_float64(q, k, v, lengths)[0]
    rows, heads = PartitionSpec("data"), PartitionSpec("data", None, "tensor")
    caches, table = heads, None
    if is_paged:  # every device has all pages, of its own heads
        k, v, table = paged(rng, k, v, lengths)
        caches = PartitionSpec(None, None, "tensor")

    def function(q, k, v, lengths, table):
        return decode_attention(q, k, v, lengths, page_table=table, implementation=implementation)

    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(heads, caches, caches, rows, rows), out_specs=heads
    )
    got = jax.jit(sharded)(*cast((q, k, v), jnp.float32), jnp.asarray(lengths), table)
    assert_close([got], [want])


def test_differentiating_is_an_error(rng):
    q, k, v, lengths = random_inputs(rng, [5, 9], 1, 2, 2, size=9)
    arrays = cast((q, np.nan_to_num(k), np.nan_to_num(v)), jnp.float32)
    with pytest.raises(TypeError, match="not differentiable; train with pallas_kernels"):
        jax.grad(lambda q: decode_attention(q, *arrays[1:], lengths).sum())(arrays[0])


# Chip, [B, Tq, H, D], [S, Hkv], page_size, dtype and options.
COMPILED = {
    "grouped heads": ("v5e", (8, 1, 32, 128), (8192, 8), None, "bfloat16", {}),
    "pages": ("v5e", (8, 1, 32, 128), (8192, 8), 16, "bfloat16", {}),
    "pages and window": ("v6e", (8, 4, 16, 128), (8192, 2), 64, "bfloat16", {"window": 1024}),
    "one long row": ("v5p", (1, 1, 16, 256), (32768, 1), None, "bfloat16", {}),
    "float32": ("v6e", (4, 2, 8, 128), (1000, 8), None, "float32", {"logits_soft_cap": 30.0}),
    "most rows": ("v5e", (2, 16, 16, 512), (1000, 16), None, "float32", {}),
    "short rows": ("v6e", (64, 1, 64, 128), (16, 8), None, "bfloat16", {}),
    "shortest rows": ("v5e", (512, 1, 8, 64), (16, 1), None, "float32", {"window": 4}),
    "largest pages": ("v5e", (2, 16, 16, 512), (1024, 8), 128, "bfloat16", {}),
}


@needs_libtpu
@pytest.mark.parametrize("case", by_chip(COMPILED))
def test_compiles_for_tpu_without_a_copy_of_the_cache_and_is_the_default_there(monkeypatch, case):
    monkeypatch.undo()
    chip, (batch, num_queries, heads, dim), (size, kv_heads), page, dtype, options = COMPILED[case]
    cache = (batch, size, kv_heads, dim)
    table = None
    if page is not None:
        cache = (batch * size // page, page, kv_heads, dim)
        table = jax.ShapeDtypeStruct((batch, size // page), "int32")
    cache = jax.ShapeDtypeStruct(cache, dtype)

    def function(q, k, v, lengths, table):
        return decode_attention(q, k, v, lengths, page_table=table, **options)

    compiled = topology.compile_for(
        chip,
        function,
        jax.ShapeDtypeStruct((batch, num_queries, heads, dim), dtype),
        cache,
        cache,
        jax.ShapeDtypeStruct((batch,), "int32"),
        table,
    )
    assert "tpu_custom_call" in compiled.as_text() and "decode_attention" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.size / 16


def arguments(heads=4, kv_heads=2, dim=4, dtype="float32", size=9, num_queries=1):
    q = np.ones((2, num_queries, heads, dim), dtype)
    cache = np.ones((2, size, kv_heads, dim), dtype)
    return {"q": q, "k_cache": cache, "v_cache": cache, "lengths": np.array([3, 9])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype float16; it takes bfloat16 and float32"),
        ({"dim": 513}, "head_dim 513; it takes up to 512"),
        ({"heads": 6, "kv_heads": 3}, "3 key heads of 4: it would have to copy the cache"),
        ({"dim": 129}, "2 key heads of 129: it would have to copy the cache"),
        ({"num_queries": 300}, "300 queries of 4 heads of 4; it takes up to 1024 of all heads"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name_and_otherwise_passed_over(changes, message):
    values = arguments(**changes)
    with pytest.raises(ValueError, match=f"'tpu_interpret' cannot: {message}"):
        decode_attention(**values, implementation="tpu_interpret")
    assert decode_attention(**values).dtype == values["q"].dtype


def test_pages_that_vmem_does_not_hold_are_refused():
    values = arguments(kv_heads=4, size=2**15) | {"page_table": np.zeros((2, 1), int)}
    with pytest.raises(ValueError, match="pages of 32768 keys of 4 heads; they do not fit"):
        decode_attention(**values, implementation="tpu_interpret")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.ones((2, 4, 4), "f")}, "q must have 4 axes"),
        ({"q": np.ones((2, 1, 4, 4), "i")}, "q must be floating point, not int32"),
        ({"q": np.ones((2, 0, 4, 4), "f")}, "q has an axis of size 0"),
        ({"q": np.ones((2, 1, 3, 4), "f")}, "3 heads, which is no multiple of the 2 heads of k"),
        ({"q": np.ones((2, 1, 4, 3), "f")}, "k_cache has head_dim 4 but q has 3"),
        ({"q": np.ones((3, 1, 4, 4), "f"), "lengths": np.ones(3, int)}, "has batch size 2 but q"),
        ({"v_cache": np.ones((2, 8, 2, 4), "f")}, "must agree in all axes but the last"),
        ({"k_cache": np.ones((2, 9, 2, 4), "float16")}, "has dtype float16 but q has float32"),
        ({"lengths": np.ones((2, 1), int)}, r"lengths must be int \[B\] = \[2\]"),
        ({"lengths": np.ones(2, "f")}, r"lengths must be int \[B\] = \[2\], not float32"),
        ({"lengths": np.array([3, 10])}, r"lengths must be in 0..9, what the cache holds"),
        ({"lengths": np.array([-1, 9])}, r"lengths must be in 0..9, .* not -1..9"),
        ({"page_table": np.ones((3, 2), int)}, r"page_table must be \[B, max_pages\]"),
        ({"page_table": np.ones((2, 2), "f")}, "page_table must be integer, not float32"),
        ({"window": 0}, "window must be a positive int or None, not 0"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap must be positive or None, not 0.0"),
        ({"implementation": "tpu"}, r"runs on \['tpu'\] only"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**(arguments() | change))
