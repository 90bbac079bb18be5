"""The scans of Mamba and Mamba-2 beside `jax.lax.associative_scan` over all states."""

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import BOTH, FORWARD, Case, Contender, implementations
from benchmarks.kernels.roofline import Work
from pallas_kernels import OPS, selective_scan, ssd_scan

# Tokens of a chunk in the dual form: what the least work of `ssd_scan` is counted with.
_CHUNK = 128


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

    # Of a state: Δ A and its exponential; times h, Δu B and their sum; times C, summed. With gradients decays and
    # states again; the adjoint, from C dy and the decay of the one after, three; those of B, C and Δ u, each a product
    # and its sum, six; through the exponent times h, then A and Δ, each summed, five.
    count = batch * time * channels * states
    forward = Work(vector_flops=6 * count, exponentials=count)
    both = Work(vector_flops=(6 + 4 + 3 + 6 + 5) * count, exponentials=2 * count)
    return Case(
        op="selective_scan",
        shape=f"[{batch}, {time}, {channels}], state {states}",
        make_inputs=make_inputs,
        contenders=(
            *implementations(selective_scan, OPS["selective_scan"]),
            Contender("associative_scan", associative_selective_scan),
        ),
        work={FORWARD: forward, BOTH: both},
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

    # Of a token: half of its chunk's C Bᵀ, once for all heads; a head, half of the weights times x, and the state,
    # written and read.
    a_token = _CHUNK * states + heads * (_CHUNK * dim + 4 * dim * states)
    forward = Work(matmul_flops=batch * time * a_token)
    return Case(
        op="ssd_scan",
        shape=f"[{batch}, {time}, {heads}, {dim}], state {states}",
        make_inputs=make_inputs,
        contenders=(
            *implementations(ssd_scan, OPS["ssd_scan"]),
            Contender("associative_scan", associative_ssd_scan),
        ),
        work={FORWARD: forward, BOTH: forward.times(3)},
    )


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
