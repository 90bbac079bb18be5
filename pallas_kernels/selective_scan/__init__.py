"""The selective scan of Mamba: signatures, validation and dispatch; the implementations are files of their own."""

import jax
import jax.numpy as jnp

from pallas_kernels.carried import across_shards
from pallas_kernels.checks import check_array, check_same_dtype, check_segment_ids
from pallas_kernels.dispatch import call, kernels_or_xla
from pallas_kernels.segments import resets
from pallas_kernels.selective_scan import reference, xla
from pallas_kernels.selective_scan.state import decay_over, state_or_zeros, step
from pallas_kernels.varying import vary_alike

__all__ = ["selective_scan", "selective_scan_decode"]

_OP = "selective_scan"

IMPLEMENTATIONS = kernels_or_xla(
    f"{__name__}.tpu", xla, reference, "selective_scan", f"{__name__}.gpu"
)


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """A linear recurrence for each channel, whose step, input and output depend on the token.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = (C_t h_t + D u_t) silu(z_t). Gu and Dao, "Mamba: Linear-Time
    Sequence Modeling with Selective State Spaces", arXiv 2312.00752, algorithm 2; A is discretised as in eq. 4 and B
    by Euler's rule, as the authors' code does. Memory is linear in time, forward and backward, without a factor N.
    Differentiable in every array and through the returned state.

    Args:
        u: float [B, T, E].
        delta: float [B, T, E], the step Δ, positive already.
        A: float [E, N], negative.
        B: float [B, T, N], of u's dtype.
        C: float [B, T, N], of u's dtype.
        D: float [E]; None: 0.
        z: float [B, T, E], of u's dtype; None: no gate.
        segment_ids: int [B, T]; tokens see only tokens of their own segment, and id 0 is padding, which writes and
            reads nothing and has y 0. A segment is a run of one id; padding inside does not end it.
        initial_state: float [B, E, N], the state after the tokens before, which are of the first segment of each
            row; None: zeros.
        return_state: also return the state after the last token.
        axis_name: inside of `jax.shard_map`, the mesh axis that time is split over: each device has its share of the
            tokens, in the order of the axis, and the states pass between them (`pallas_kernels.carried`), at twice the
            work. `initial_state` and the returned state are those before the first and after the last token of all,
            the same on every device. None: every device has whole rows.
        implementation: "tpu" (Pallas, Mosaic), "gpu" (Pallas, Mosaic GPU: Hopper), "xla", "reference", or
            "tpu_interpret" and "gpu_interpret", the kernels run anywhere by Pallas' interpreters; None takes the best
            for this platform and these arguments, and "gpu" only by name.

    Returns:
        y [B, T, E] in u's dtype; with `return_state` the pair of it and the state [B, E, N], which is float32 (float64
        for float64 arguments).

    Raises:
        ValueError: an argument is malformed, or `implementation` cannot run on this platform.
    """
    check_array(_OP, "u", u, "[B, T, E]", (None, None, None))
    _check(u, delta, A, B, C, D, z, initial_state, "B, T")
    if segment_ids is not None:
        check_segment_ids(_OP, segment_ids, u.shape[:2])
    A, D, state = _in_state_dtype(u, delta, A, D, initial_state)
    reset = is_token = None
    if segment_ids is not None:
        reset, is_token = resets(jnp.asarray(segment_ids))
        delta = jnp.where(is_token[..., None], delta, 0)

    def scan(state):
        # None: zeros, which the kernels need not read.
        arguments = vary_alike((u, delta, A, B, C, D, z, reset, state))
        return call(_OP, IMPLEMENTATIONS, implementation, *arguments)

    if axis_name is None:
        y, state = scan(state)
    else:
        state = state_or_zeros(state, u, A)
        y, state = across_shards(scan, state, segment_ids, axis_name, decay_over(delta, A))
    if is_token is not None:
        y = jnp.where(is_token[..., None], y, 0)
    return (y, state) if return_state else y


def selective_scan_decode(
    state: jax.Array,
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `selective_scan`, in time and memory that do not depend on how many came before.

    Args:
        state: float [B, E, N], what `selective_scan(..., return_state=True)` or this returned; zeros at first.
        u: float [B, E] or [B, 1, E].
        delta: float, of u's shape.
        A: float [E, N].
        B: float [B, N] or [B, 1, N].
        C: float, of B's shape.
        D: float [E]; None: 0.
        z: float, of u's shape; None: no gate.

    Returns:
        `(y, state)`; y is of u's shape and dtype.

    Raises:
        ValueError: an argument is malformed.
    """
    has_time = jnp.ndim(u) == 3
    if has_time:
        check_array(_OP, "u", u, "[B, 1, E]", (None, 1, None))
    else:
        check_array(_OP, "u", u, "[B, E]", (None, None))
    _check(u, delta, A, B, C, D, z, state, "B, 1" if has_time else "B")
    A, D, state = _in_state_dtype(u, delta, A, D, state)
    tokens = (u, delta, B, C, z)
    if has_time:
        tokens = jax.tree.map(lambda x: x[:, 0], tokens)
    u, delta, B, C, z = tokens
    y, state = step(state, u, delta, A, B, C, D, z)
    y = y.astype(u.dtype)
    return (y[:, None] if has_time else y), state


def _check(u, delta, A, B, C, D, z, state, axes: str) -> None:
    """Everything but u, whose leading axes are `axes`."""
    *leading, channels = u.shape
    check_array(_OP, "A", A, "[E, N]", (channels, None))
    states = A.shape[1]
    check_array(_OP, "delta", delta, f"[{axes}, E]", u.shape)
    for name, x in (("B", B), ("C", C)):
        check_array(_OP, name, x, f"[{axes}, N]", (*leading, states))
        check_same_dtype(_OP, name, x, "u", u)
    if D is not None:
        check_array(_OP, "D", D, "[E]", (channels,))
    if z is not None:
        check_array(_OP, "z", z, f"[{axes}, E]", u.shape)
        check_same_dtype(_OP, "z", z, "u", u)
    if state is not None:
        check_array(_OP, "the state", state, "[B, E, N]", (leading[0], channels, states))


def _in_state_dtype(u, delta, A, D, state):
    """A, D and the state, those that there are, in the dtype of the computation."""
    dtype = jnp.promote_types(jnp.promote_types(u.dtype, delta.dtype), jnp.float32)
    return (None if x is None else x.astype(dtype) for x in (A, D, state))
