"""The scans of Mamba and Mamba-2 beside `jax.lax.associative_scan` over all states."""

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import BOTH, FORWARD, Case, Contender, implementations
from benchmarks.kernels.roofline import Product, Work
from pallas_kernels import OPS, selective_scan, ssd_scan

# Lengths that the chunks of the dual form may have.
_CHUNKS = (64, 128, 256, 512)


def selective_scan_cases(quick: bool) -> list[Case]:
    """Mamba's scan at a toy size, and of a model of width 384."""
    shapes = [(1, 512, 256, 16), (2, 2048, 768, 16)]
    return [_selective_scan_case(*shape) for shape in shapes[: 1 if quick else None]]


def ssd_scan_cases(quick: bool) -> list[Case]:
    """Mamba-2's scan, short and long."""
    shapes = [(1, 512, 4, 64, 64), (1, 2048, 8, 64, 64)]
    return [_ssd_scan_case(*shape) for shape in shapes[: 1 if quick else None]]


def _selective_scan_case(batch: int, time: int, channels: int, states: int) -> Case:
    def make_inputs(key, dtype):
        keys = jax.random.split(key, 4)
        return {
            "u": jax.random.normal(keys[0], (batch, time, channels), dtype),
            "delta": jax.random.uniform(keys[1], (batch, time, channels), dtype, 0.01, 0.1),
            "A": -jnp.tile(jnp.arange(1.0, states + 1), (channels, 1)),
            "B": jax.random.normal(keys[2], (batch, time, states), dtype),
            "C": jax.random.normal(keys[3], (batch, time, states), dtype),
        }

    # Of a state: Δ A and its exponential; times h, Δu B and their sum. With gradients decays and states again; the
    # adjoint, from C dy and the decay of the one after, three; through the exponent times h and times itself, two. What
    # is left are sums over states, channels or tokens, for C h and the gradients of B, C, Δ u, and of Δ and A, which
    # are divided by them: these a matrix unit can do for 16 tokens at once, of which each takes its own states.
    # Of a channel: Δ u. With gradients that again; the gradient of it times Δ and times u; what Δ gets of the exponent,
    # divided, and the sum of both.
    count, rows, step = batch * time * channels * states, batch * time * channels, 16
    steps = batch * time / step
    over_states = Product(step, step * states, channels, steps)
    over_channels = Product(step, channels, step * states, steps)
    forward = Work((over_states,), 4 * count + rows, count)
    products = (over_states,) * 2 + (over_channels,) * 2
    backward = Work(products, (4 + 3 + 2) * count + 5 * rows, count)
    return Case(
        op="selective_scan",
        shape=f"[{batch}, {time}, {channels}], state {states}",
        make_inputs=make_inputs,
        contenders=(
            *implementations(selective_scan, OPS["selective_scan"]),
            Contender("associative_scan", associative_selective_scan),
        ),
        work={FORWARD: (forward,), BOTH: (forward + backward,)},
    )


def _ssd_scan_case(batch: int, time: int, heads: int, dim: int, states: int) -> Case:
    def make_inputs(key, dtype):
        keys = jax.random.split(key, 4)
        return {
            "x": jax.random.normal(keys[0], (batch, time, heads, dim), dtype),
            "dt": jax.random.uniform(keys[1], (batch, time, heads), jnp.float32, 0.01, 0.1),
            "A": -jnp.arange(1.0, heads + 1),
            "B": jax.random.normal(keys[2], (batch, time, 1, states), dtype),
            "C": jax.random.normal(keys[3], (batch, time, 1, states), dtype),
        }

    # A way for each length of a chunk.
    sizes = [(chunk, heads, dim, states) for chunk in _CHUNKS]
    chunks = [batch * time / chunk for chunk in _CHUNKS]
    forward = [_ssd_forward(*x).times(n) for x, n in zip(sizes, chunks, strict=True)]
    backward = [_ssd_backward(*x).times(n) for x, n in zip(sizes, chunks, strict=True)]
    return Case(
        op="ssd_scan",
        shape=f"[{batch}, {time}, {heads}, {dim}], state {states}",
        make_inputs=make_inputs,
        contenders=(
            *implementations(ssd_scan, OPS["ssd_scan"]),
            Contender("associative_scan", associative_ssd_scan),
        ),
        work={FORWARD: forward, BOTH: [x + y for x, y in zip(forward, backward, strict=True)]},
    )


def _ssd_forward(chunk: int, heads: int, dim: int, states: int) -> Work:
    """Of a chunk: C Bᵀ once for all heads, the weights times x a head, the states written and read.

    Elementwise, of a pair that is seen, a head, the difference of two sums, its exponential, and a product; of a
    channel dt x, what is left of it at the end of the chunk, and the decay of what is read.
    """
    channels = heads * dim
    products = (
        Product(chunk, states, chunk),
        Product(chunk, chunk, dim, heads),
        Product(states, chunk, channels),
        Product(chunk, states, channels),
    )
    pairs = heads * chunk * (chunk + 1) / 2
    return Work(products, 2 * pairs + 3 * chunk * channels, pairs)


def _ssd_backward(chunk: int, heads: int, dim: int, states: int) -> Work:
    """With the states of the forward at hand: C Bᵀ again; a head, the gradients of the weights and of x through them;
    those of B and C through C Bᵀ; through the states those of x, B, C and of the states.

    Elementwise, of a pair its weight again, the gradient of the similarity, summed over heads, and the gradient of the
    exponent, summed twice; of a channel as much as in the forward, and its part in the gradient of dt.
    """
    channels = heads * dim
    products = (
        Product(chunk, states, chunk),
        *[Product(chunk, dim, chunk, heads), Product(chunk, chunk, dim, heads)],
        *[Product(chunk, chunk, states)] * 2,
        *[Product(chunk, channels, states)] * 2,
        *[Product(chunk, states, channels), Product(states, chunk, channels)],
    )
    pairs = heads * chunk * (chunk + 1) / 2
    return Work(products, 7 * pairs + 5 * chunk * channels, pairs)


def associative_selective_scan(u, delta, A, B, C):
    """Mamba's recurrence with all states in memory, [B, T, E, N]."""
    decay = jnp.exp(delta[..., None] * A)
    written = (delta * u)[..., None] * B[:, :, None]
    return jnp.einsum("bten,btn->bte", _linear_recurrence(decay, written), C).astype(u.dtype)


def associative_ssd_scan(x, dt, A, B, C):
    """Mamba-2's recurrence with all states in memory, [B, T, H, P, N]; one group."""
    decay = jnp.exp(dt * A)[..., None, None]
    written = (dt[..., None] * x)[..., None] * B[:, :, :, None]
    h = _linear_recurrence(jnp.broadcast_to(decay, written.shape), written)
    return jnp.einsum("bthpn,btn->bthp", h, C[:, :, 0]).astype(x.dtype)


def _linear_recurrence(decay, written):
    """h_t = decay_t h_{t-1} + written_t along axis 1."""

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return jax.lax.associative_scan(combine, (decay, written), axis=1)[1]
