"""With `jax_enable_x64` integers are of 64 bits where nobody says otherwise, and TPU kernels can have none: every op
that has kernels compiles in that mode too, and its kernels are computed as they are without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from proof import compile_with_gradients, needs_libtpu

import pallas_kernels as pk
from pallas_kernels import topology

BATCH, TIME, HEADS, DIM = 2, 300, 2, 64


def segments():
    # Of 64 bits in this mode.
    return jnp.ones((BATCH, TIME), int)


def attention(dtype):
    tokens = jax.ShapeDtypeStruct((BATCH, TIME, HEADS, DIM), dtype)
    function = functools.partial(pk.attention, segment_ids=segments(), window=100)
    return function, dict.fromkeys("qkv", tokens)


def linear_attention(dtype):
    def tokens(dim):
        return jax.ShapeDtypeStruct((BATCH, TIME, 8, dim), dtype)

    function = functools.partial(pk.linear_attention, segment_ids=segments())
    return function, {"q": tokens(16), "k": tokens(16), "v": tokens(DIM)}


def selective_scan(dtype):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    inputs = {"A": shape((128, 16)), "D": shape((128,))}
    inputs |= {name: shape((BATCH, TIME, 128)) for name in ("u", "delta", "z")}
    inputs |= {name: shape((BATCH, TIME, 16)) for name in "BC"}
    return functools.partial(pk.selective_scan, segment_ids=segments()), inputs


def ssd_scan(dtype):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    inputs = {"x": shape((BATCH, TIME, HEADS, DIM)), "dt": shape((BATCH, TIME, HEADS))}
    inputs |= {name: shape((HEADS,)) for name in "AD"}
    inputs |= {name: shape((BATCH, TIME, 1, DIM)) for name in "BC"}
    return functools.partial(pk.ssd_scan, segment_ids=segments()), inputs


def softmax(dtype):
    return pk.softmax, {"x": jax.ShapeDtypeStruct((BATCH, TIME, 5000), dtype)}


def cross_entropy(dtype):
    def function(logits):
        return sum(pk.cross_entropy(logits, segments()))

    return function, {"logits": jax.ShapeDtypeStruct((BATCH, TIME, 5000), dtype)}


def grouped_matmul(dtype):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)

    def function(lhs, rhs):
        # A value of the program, so that no compiler counts on it.
        return pk.grouped_matmul(lhs, rhs, jnp.full(4, 60) + (lhs[0, 0] > 0))

    return function, {"lhs": shape((512, 128)), "rhs": shape((4, 128, 256))}


OPS = {
    function.__name__: function
    for function in (
        attention,
        linear_attention,
        selective_scan,
        ssd_scan,
        softmax,
        cross_entropy,
        grouped_matmul,
    )
}
FAST = ("softmax", "bfloat16")


def test_kernels_are_interpreted_alike(rng):
    x = np.asarray(rng.normal(size=(3, 200)), np.float32)
    want = pk.softmax(x, implementation="tpu_interpret")
    with jax.enable_x64(True):
        got = pk.softmax(x, implementation="tpu_interpret")
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


@needs_libtpu
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(op, dtype, marks=() if (op, dtype) == FAST else pytest.mark.slow)
        for op in OPS
        for dtype in ("bfloat16", "float32")
    ],
)
def test_compiles_for_tpu(op, dtype):
    with jax.enable_x64(True):
        function, inputs = OPS[op](dtype)
        text = compile_with_gradients("v5e", function, inputs).as_text()
    assert "tpu_custom_call" in text


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [None, 64])
def test_decode_attention_compiles_for_tpu(dtype, page_size):
    size = 1024
    cache, table = (BATCH, size, HEADS, 128), None
    if page_size is not None:
        cache = (BATCH * size // page_size, page_size, *cache[2:])
        table = jax.ShapeDtypeStruct((BATCH, size // page_size), "int64")
    cache = jax.ShapeDtypeStruct(cache, dtype)

    def function(q, k, v, lengths, table):
        return pk.decode_attention(q, k, v, lengths, page_table=table, window=500)

    q, lengths = (BATCH, 1, 2 * HEADS, 128), jax.ShapeDtypeStruct((BATCH,), "int64")
    with jax.enable_x64(True):
        compiled = topology.compile_for(
            "v5e", function, jax.ShapeDtypeStruct(q, dtype), cache, cache, lengths, table
        )
    assert "tpu_custom_call" in compiled.as_text()
