"""BASED's Taylor attention beside two ways to write it in plain jax: quadratic, and chunk by chunk over a state."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import BOTH, FORWARD, Case, Contender, implementations
from benchmarks.kernels.roofline import Product, Work
from pallas_kernels import OPS, linear_attention

_CHUNK = 128
# Lengths that the chunks of a kernel may have.
_CHUNKS = (64, 128, 256, 512)


def linear_attention_cases(quick: bool) -> list[Case]:
    """BASED's shape (16 dimensions to compare, 64 of values), short and long."""
    shapes = [(2, 512, 4, 16, 64), (2, 2048, 8, 16, 64)]
    return [_case(*shape) for shape in shapes[: 1 if quick else None]]


def _case(batch: int, time: int, heads: int, dim: int, value_dim: int) -> Case:
    def make_inputs(key, dtype):
        keys = jax.random.split(key, 3)
        dims = (dim, dim, value_dim)
        return {
            name: jax.random.normal(k, (batch, time, heads, width), dtype)
            for name, k, width in zip("qkv", keys, dims, strict=True)
        }

    features = 1 + dim + dim * (dim + 1) // 2
    # Of a token: half of its chunk's q kᵀ and weights times values and their sum; the state, written and read.
    a_token = _CHUNK * (dim + value_dim + 1) + 4 * features * (value_dim + 1)
    forward = Work(matmul_flops=batch * time * heads * a_token)

    def ways(products) -> tuple[tuple[Product, ...], ...]:
        return tuple(
            tuple(
                Product(*sizes, times=batch * heads * time / chunk)
                for sizes in products(chunk, dim, value_dim + 1, features)
            )
            for chunk in _CHUNKS
        )

    both = dataclasses.replace(forward.times(3), products=ways(_products_with_gradients))
    forward = dataclasses.replace(forward, products=ways(_products))
    return Case(
        op="linear_attention",
        shape=f"[{batch}, {time}, {heads}, {dim}], values {value_dim}, taylor",
        make_inputs=make_inputs,
        contenders=(
            *implementations(linear_attention, OPS["linear_attention"]),
            Contender("quadratic", quadratic),
            Contender("chunks in jax", chunked),
        ),
        work={FORWARD: forward, BOTH: both},
    )


def _products(chunk, dim, width, features) -> list[tuple[int, int, int]]:
    """Of a chunk of a head: q kᵀ, weights times values (with their ones), the state written and read."""
    return [
        (chunk, dim, chunk),
        (width, chunk, chunk),
        (width, chunk, features),
        (width, features, chunk),
    ]


def _products_with_gradients(chunk, dim, width, features) -> list[tuple[int, int, int]]:
    """Besides, with the states of the forward at hand: q kᵀ again, the gradients of the weights, of q, k and v through
    them, of φ(q), φ(k) and v through the states, and of the state."""
    return [
        *_products(chunk, dim, width, features),
        (chunk, dim, chunk),
        (chunk, width, chunk),
        *[(dim, chunk, chunk)] * 2,
        (width, chunk, chunk),
        *[(features, width, chunk)] * 2,
        (width, features, chunk),
        (features, chunk, width),
    ]


def quadratic(q, k, v):
    """All T x T weights, masked: the form to beat at short lengths."""
    weights = jnp.tril(_taylor(jnp.einsum("bthd,bshd->bhts", q, k), q.shape[-1]))
    out = jnp.einsum("bhts,bshv->bthv", weights, v)
    return out / weights.sum(-1).swapaxes(1, 2)[..., None]


def chunked(q, k, v):
    """A scan over chunks with a state of expanded features, the form of flash-linear-attention."""
    batch, time, heads, dim = q.shape
    ones = jnp.ones_like(v[..., :1])

    def by_chunk(x):
        return x.reshape(batch, time // _CHUNK, _CHUNK, heads, -1).transpose(1, 0, 3, 2, 4)

    def step(state, chunk):
        q, k, v = chunk
        weights = jnp.tril(_taylor(q @ k.swapaxes(-1, -2), dim))
        out = weights @ v + _expand(q) @ state
        return state + _expand(k).swapaxes(-1, -2) @ v, out

    values = jnp.concatenate([v, ones], axis=-1)
    state = jnp.zeros((batch, heads, 1 + dim + dim * dim, values.shape[-1]), v.dtype)
    _, out = jax.lax.scan(step, state, tuple(map(by_chunk, (q, k, values))))
    out = out.transpose(1, 0, 3, 2, 4).reshape(batch, time, heads, -1)
    return out[..., :-1] / out[..., -1:]


def _taylor(products, dim: int):
    logits = products / math.sqrt(dim)
    return 1 + logits + logits**2 / 2


def _expand(x):
    """φ with φ(q) · φ(k) = 1 + x + x²/2, x = q · k / sqrt(d): [..., d] -> [..., 1 + d + d²]."""
    dim = x.shape[-1]
    x = x * dim**-0.25
    pairs = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], dim * dim)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs / math.sqrt(2)], axis=-1)
