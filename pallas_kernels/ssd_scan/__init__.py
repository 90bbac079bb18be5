"""The scan of Mamba-2: signatures, validation and dispatch; the implementations are files of their own."""

import jax
import jax.numpy as jnp

from pallas_kernels.carried import across_shards
from pallas_kernels.checks import (
    check_array,
    check_positive_int,
    check_same_dtype,
    check_segment_ids,
)
from pallas_kernels.dispatch import call, kernels_or_xla
from pallas_kernels.segments import resets
from pallas_kernels.ssd_scan import reference, xla
from pallas_kernels.ssd_scan.state import state_or_zeros, step
from pallas_kernels.varying import vary_alike

__all__ = ["ssd_decode", "ssd_scan"]

_OP = "ssd_scan"

IMPLEMENTATIONS = kernels_or_xla(f"{__name__}.tpu", xla, reference, "ssd_scan", f"{__name__}.gpu")


def ssd_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """A linear recurrence for each head, whose decay is one number a head and token.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ and y_t = h_t C_t + D x_t. Dao and Gu, "Transformers are SSMs",
    arXiv 2405.21060, eq. 2 with A a multiple of the identity (section 5) and B discretised by Euler's rule. Its dual
    is attention with the weights (C_t · B_s) exp(Σ dt A) dt_s: quadratic inside a chunk, on the matrix unit, with a
    state between chunks (section 6). Memory is linear in time, forward and backward. Differentiable in every array
    and through the returned state.

    Args:
        x: float [B, T, H, P].
        dt: float [B, T, H], the step, positive already.
        A: float [H], negative.
        B: float [B, T, G, N], of x's dtype; G divides H, and heads of one group are neighbours.
        C: float [B, T, G, N], of x's dtype.
        D: float [H]; None: 0.
        segment_ids: int [B, T]; tokens see only tokens of their own segment, and id 0 is padding, which writes and
            reads nothing and has y 0. A segment is a run of one id; padding inside does not end it.
        initial_state: float [B, H, P, N], the state after the tokens before, which are of the first segment of each
            row; None: zeros.
        return_state: also return the state after the last token.
        axis_name: inside of `jax.shard_map`, the mesh axis that time is split over: each device has its share of the
            tokens, in the order of the axis, and the states pass between them (`pallas_kernels.carried`), at twice the
            work. `initial_state` and the returned state are those before the first and after the last token of all,
            the same on every device. None: every device has whole rows.
        chunk_size: tokens a chunk; None: chosen by the implementation.
        implementation: "tpu" (Pallas, Mosaic), "gpu" (Pallas, Mosaic GPU: Hopper, bfloat16, N up to 128), "xla",
            "reference", or "tpu_interpret" and "gpu_interpret", the kernels run anywhere by Pallas' interpreters; None
            takes the best for this platform and these arguments, and "gpu" only by name.

    Returns:
        y [B, T, H, P] in x's dtype; with `return_state` the pair of it and the state [B, H, P, N], which is float32
        (float64 for float64 arguments).

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    check_array(_OP, "x", x, "[B, T, H, P]", (None, None, None, None))
    _check(x, dt, A, B, C, D, initial_state, "B, T")
    if segment_ids is not None:
        check_segment_ids(_OP, segment_ids, x.shape[:2])
    check_positive_int(_OP, "chunk_size", chunk_size)
    A, D, state = _in_state_dtype(x, dt, A, D, initial_state)
    reset = is_token = None
    if segment_ids is not None:
        reset, is_token = resets(jnp.asarray(segment_ids))
        dt = jnp.where(is_token[..., None], dt, 0)

    def scan(state):
        # None: zeros, which the kernels need not read.
        arguments = vary_alike((x, dt, A, B, C, D, reset, state))
        return call(_OP, IMPLEMENTATIONS, implementation, *arguments, chunk_size=chunk_size)

    if axis_name is None:
        y, state = scan(state)
    else:
        decay = jnp.exp(jnp.sum(dt.astype(A.dtype), axis=1) * A)[..., None, None]
        state = state_or_zeros(state, x, A, B)
        y, state = across_shards(scan, state, segment_ids, axis_name, decay)
    if is_token is not None:
        y = jnp.where(is_token[..., None, None], y, 0)
    return (y, state) if return_state else y


def ssd_decode(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `ssd_scan`, in time and memory that do not depend on how many came before.

    Args:
        state: float [B, H, P, N], what `ssd_scan(..., return_state=True)` or this returned; zeros at first.
        x: float [B, H, P] or [B, 1, H, P].
        dt: float [B, H] or [B, 1, H].
        A: float [H].
        B: float [B, G, N] or [B, 1, G, N].
        C: float, of B's shape.
        D: float [H]; None: 0.

    Returns:
        `(y, state)`; y is of x's shape and dtype.

    Raises:
        ValueError: an argument is malformed.
    """
    has_time = jnp.ndim(x) == 4
    if has_time:
        check_array(_OP, "x", x, "[B, 1, H, P]", (None, 1, None, None))
    else:
        check_array(_OP, "x", x, "[B, H, P]", (None, None, None))
    _check(x, dt, A, B, C, D, state, "B, 1" if has_time else "B")
    A, D, state = _in_state_dtype(x, dt, A, D, state)
    tokens = (x, dt, B, C)
    if has_time:
        tokens = jax.tree.map(lambda array: array[:, 0], tokens)
    x, dt, B, C = tokens
    y, state = step(state, x, dt, A, B, C, D)
    y = y.astype(x.dtype)
    return (y[:, None] if has_time else y), state


def _check(x, dt, A, B, C, D, state, axes: str) -> None:
    """Everything but x, whose leading axes are `axes`."""
    *leading, heads, dim = x.shape
    check_array(_OP, "dt", dt, f"[{axes}, H]", (*leading, heads))
    check_array(_OP, "A", A, "[H]", (heads,))
    check_array(_OP, "B", B, f"[{axes}, G, N]", (*leading, None, None))
    groups, states = B.shape[-2:]
    if heads % groups:
        raise ValueError(f"{_OP}: B has {groups} groups; valid: a divisor of x's {heads} heads")
    check_array(_OP, "C", C, f"[{axes}, G, N]", B.shape)
    for name, array in (("B", B), ("C", C)):
        check_same_dtype(_OP, name, array, "x", x)
    if D is not None:
        check_array(_OP, "D", D, "[H]", (heads,))
    if state is not None:
        check_array(_OP, "the state", state, "[B, H, P, N]", (leading[0], heads, dim, states))


def _in_state_dtype(x, dt, A, D, state):
    """A, D and the state, those that there are, in the dtype of the computation."""
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, dt.dtype), jnp.float32)
    return (None if array is None else array.astype(dtype) for array in (A, D, state))
