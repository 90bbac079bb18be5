"""Attention for NVIDIA GPUs since Ampere (Triton): the forward kernel.

Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1: a program has a block of queries of one head, and visits the
tiles of keys that they may see. It is for the GPUs that `gpu.py`, for Hopper, is not for.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.attention import triton_backward, triton_blocks
from pallas_kernels.attention.kernels import Kernels, differentiable
from pallas_kernels.attention.mask import Mask, Tokens
from pallas_kernels.attention.triton_tile import (
    FULL,
    LOG2_E,
    Spec,
    base2_logits,
    key_tiles,
    load_tokens,
    tiles_of,
    token_arrays,
    where_allowed,
)
from pallas_kernels.triton_tiles import Heads, dot, load_tile, store_tile, vector_pointers

DTYPES = ("float16", "bfloat16", "float32")
# Below any logit, and finite: the difference of two of them is 0.
LOWEST = tl.constexpr(-1e30)


def refuses(q, k, v, queries, keys, *, mask, scale, logits_soft_cap) -> str | None:
    """What the kernel cannot do with these arguments, or None."""
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}; it takes {', '.join(DTYPES)}"
    head_dim, largest = max(q.shape[3], v.shape[3]), triton_blocks.largest_head_dim(q.dtype)
    if head_dim > largest:
        return f"head_dim {head_dim}; it takes up to {largest} in {q.dtype}"
    return None


def attention(
    q,
    k,
    v,
    queries: Tokens,
    keys: Tokens,
    *,
    mask: Mask,
    scale,
    logits_soft_cap,
    known=None,
    interpret: bool = False,
):
    """Returns `(out [B, Tq, H, Dv], lse [B, Tq, H])`, or `known`; see the package for the arguments.

    `interpret`: run without a GPU, by Triton's interpreter.
    """
    spec = Spec(
        q=Heads.of(q),
        k=Heads.of(k),
        v=Heads.of(v),
        mask=mask,
        has_tokens=mask.takes_tokens(queries),
        scale=scale,
        soft_cap=logits_soft_cap,
        blocks=triton_blocks.of(triton_blocks.FORWARD, q, v),
    )
    return differentiable(_KERNELS, (spec, interpret), q, k, v, queries, keys, known)


def _out_and_lse(static: tuple[Spec, bool], q, k, v, queries, keys):
    spec, interpret = static
    length, heads = spec.q.length, spec.q.heads
    out, lse = triton_call.call(
        attention_forward,
        (q, k, v, *token_arrays(spec, queries, keys, q.shape[0])),
        out=(
            jax.ShapeDtypeStruct((length, heads, spec.v.dim), v.dtype),
            jax.ShapeDtypeStruct((heads, length), jnp.float32),
        ),
        programs=spec.num_query_blocks * heads,
        constants={"s": spec},
        launch=spec.blocks.launch,
        interpret=interpret,
    )
    return out, lse.swapaxes(1, 2)


_KERNELS = Kernels(_out_and_lse, triton_backward.backward)


@triton.jit
def attention_forward(
    q, k, v, q_position, k_position, q_segment, k_segment, out, lse, s: tl.constexpr
):
    """A program: a block of queries of one head -> out, and lse [B, H, Tq].

    Args:
        q: [B, Tq, H, D].
        k: [B, Tk, Hkv, D].
        v: [B, Tk, Hkv, Dv].
        q_position: int32 [B, Tq], or None; the other tokens likewise.
        k_position: int32 [B, Tk].
        q_segment: int32 [B, Tq].
        k_segment: int32 [B, Tk].
        out: [B, Tq, H, Dv].
        lse: float32 [B, H, Tq].
        s: the static arguments.
    """
    program = tl.program_id(0)
    row = program // s.num_query_blocks
    batch, head = row // s.q.heads, row % s.q.heads
    # Causal rows are the longer the later they are, and the longest begin first.
    start = (s.num_query_blocks - 1 - program % s.num_query_blocks) * s.blocks.queries
    q_tile = load_tile(q, s.q, batch, head, start, s.blocks.queries)
    query, query_segment = load_tokens(
        q_position, q_segment, s.q.length, s.mask.offset, batch, start, s.blocks.queries
    )
    values = tl.full((s.blocks.queries, s.v.width), 0, tl.float32)
    total = tl.full((s.blocks.queries,), 0, tl.float32)
    highest = tl.full((s.blocks.queries,), LOWEST, tl.float32)
    bounds = key_tiles(s, start)
    first_phase: tl.constexpr = s.key_phases[0]
    stop_phase: tl.constexpr = s.key_phases[1]
    for phase in tl.static_range(first_phase, stop_phase):
        first, stop = tiles_of(phase, bounds)
        for tile in tl.range(first, stop):
            key_start = tile * s.blocks.keys
            k_tile = load_tile(k, s.k, batch, head // s.group, key_start, s.blocks.keys)
            logits = base2_logits(s, dot(q_tile, tl.trans(k_tile)))
            if phase != FULL:
                key, key_segment = load_tokens(
                    k_position, k_segment, s.k.length, 0, batch, key_start, s.blocks.keys
                )
                logits = where_allowed(
                    s,
                    logits,
                    -float("inf"),
                    query[:, None],
                    key[None, :],
                    query_segment[:, None],
                    key_segment[None, :],
                    q_segment is not None,
                )
            now = tl.maximum(highest, tl.max(logits, axis=1))
            weights = tl.exp2(logits - now[:, None])
            rescale = tl.exp2(highest - now)
            total = total * rescale + tl.sum(weights, axis=1)
            v_tile = load_tile(v, s.v, batch, head // s.group, key_start, s.blocks.keys)
            values = dot(weights.to(v_tile.dtype), v_tile, values * rescale[:, None])
            highest = now
    # A row that sees nothing has total 0: out 0, lse -inf.
    divisor = tl.where(total == 0, 1, total)
    store_tile(out, s.out, batch, head, start, values / divisor[:, None])
    pointers, exists = vector_pointers(lse, s.q.length, row, start, s.blocks.queries)
    found = highest * (1 / LOG2_E) + tl.log(divisor)
    tl.store(pointers, tl.where(total == 0, -float("inf"), found), mask=exists)
