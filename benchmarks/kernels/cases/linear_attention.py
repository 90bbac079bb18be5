"""BASED's Taylor attention beside two ways to write it in plain jax: quadratic, and chunk by chunk over a state."""

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

    # A way for each length of a chunk.
    sizes = [(chunk, dim, value_dim + 1) for chunk in _CHUNKS]
    chunks = [batch * heads * time / chunk for chunk in _CHUNKS]
    forward = [_forward(*x).times(n) for x, n in zip(sizes, chunks, strict=True)]
    backward = [_backward(*x).times(n) for x, n in zip(sizes, chunks, strict=True)]
    return Case(
        op="linear_attention",
        shape=f"[{batch}, {time}, {heads}, {dim}], values {value_dim}, taylor",
        make_inputs=make_inputs,
        contenders=(
            *implementations(linear_attention, OPS["linear_attention"]),
            Contender("quadratic", quadratic),
            Contender("chunks in jax", chunked),
        ),
        work={FORWARD: forward, BOTH: [x + y for x, y in zip(forward, backward, strict=True)]},
    )


def _forward(chunk: int, dim: int, width: int) -> Work:
    """Of a chunk of a head: q kᵀ, weights times values (with their ones), the state written and read. Elementwise, of
    a pair that is seen a square and a sum, of a token the pairs of its dimensions, and the division of its sums."""
    pairs = dim * (dim + 1) // 2
    products = (
        Product(chunk, dim, chunk),
        Product(width, chunk, chunk),
        Product(width, chunk, 1 + dim + pairs),
        Product(width, 1 + dim + pairs, chunk),
    )
    return Work(products, vector_flops=chunk * (chunk + 1 + 2 * pairs + width))


def _backward(chunk: int, dim: int, width: int) -> Work:
    """With the states of the forward at hand: q kᵀ again, the gradients of the weights, of q, k and v through them, of
    φ(q), φ(k) and v through the states, and of the state.

    Elementwise, of a pair the weight again and its slope times its gradient; of a token the pairs of dimensions again
    and from the gradient of each a product and a sum for both of its dimensions; the gradients of the division.
    """
    pairs = dim * (dim + 1) // 2
    features = 1 + dim + pairs
    products = (
        Product(chunk, dim, chunk),
        Product(chunk, width, chunk),
        *[Product(dim, chunk, chunk)] * 2,
        Product(width, chunk, chunk),
        *[Product(features, width, chunk)] * 2,
        Product(width, features, chunk),
        Product(features, chunk, width),
    )
    of_tokens = 2 * pairs + 2 * 4 * pairs + 3 * width
    return Work(products, vector_flops=chunk * (1.5 * (chunk + 1) + of_tokens))


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
