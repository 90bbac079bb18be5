"""Attention whose time axis is split over a mesh axis: no device ever holds the keys of another for longer than a step.

Keys and values travel once around the ring of devices, while each device keeps its queries and adds up what it has seen
by the log-sum-exp (Liu et al., "Ring attention with blockwise transformers", arXiv 2310.01889). So the memory of a
device, forward and backward, is that of its own share, and the next keys are on their way while the present ones are at
work. The backward pass goes around once more: the keys collect their gradients on the way, and are home again with all
of them. In index order a shard is before, at or after the queries as a whole, so that no tile of a causal mask is cut
but on the diagonal, and shards that come later cost nothing.

A window needs no ring: its keys are those of the nearest shards before, fetched directly.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Tokens
from pallas_kernels.residuals import keep
from pallas_kernels.varying import vary_alike

# `(q, k, v, queries, keys, *, causal, window) -> (out, lse)` for arrays of one device; no positions mean index order.
Attend = Callable[..., tuple[jax.Array, jax.Array]]


class _Spec(NamedTuple):
    """The static arguments."""

    attend: Attend
    causal: bool
    window: int | None
    axis_name: str


def attention(
    attend: Attend, q, k, v, queries: Tokens, keys: Tokens, *, causal, window, axis_name
) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of this device's queries and the keys of all; see the package for the arguments."""
    spec = _Spec(attend, causal, window, axis_name)
    if queries.position is None and causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention: with axis_name, Tq={q.shape[1]} and Tk={k.shape[1]} must agree, or give positions"
        )
    if queries.position is None and window is not None:
        return _from_nearest(spec, q, k, v, queries, keys)
    return _ring(spec, *vary_alike((q, k, v, queries, keys)))


def _from_nearest(spec, q, k, v, queries, keys):
    """Fetches the `window - 1` keys before the first query; where there are none, padding comes."""
    if keys.segment is None:
        one = jnp.ones_like(q, jnp.int32, shape=q.shape[:2])
        queries, keys = Tokens(None, one), Tokens(None, one)
    own, num_devices = (k, v, keys), jax.lax.axis_size(spec.axis_name)
    pieces, missing = [own], spec.window - 1
    for hops in range(1, num_devices):
        count = min(missing, k.shape[1])
        if count == 0:
            break
        onward = [(i, i + hops) for i in range(num_devices - hops)]
        newest = jax.tree.map(lambda x: x[:, -count:], own)  # noqa: B023 (called here)
        pieces.insert(0, jax.lax.ppermute(newest, spec.axis_name, onward))
        missing -= count
    k, v, keys = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *pieces)
    return spec.attend(q, k, v, queries, keys, causal=True, window=spec.window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(spec, q, k, v, queries, keys):
    return _forward(spec, q, k, v, queries, keys)[0]


def _forward(spec, q, k, v, queries, keys):
    own = (k, v, keys)

    def hop(carry, hops):
        out, lse, here = carry
        coming = _onward(spec, here)
        found = _where_seen(spec, hops, _tile, _nothing, (q, *here[:2], queries, here[2]))
        return (*_merged((out, lse), found), coming), None

    coming = _onward(spec, own)
    out, lse = _tile(spec, 0, q, k, v, queries, keys)
    carry = (out.astype(lse.dtype), lse, coming)
    (out, lse, _), _ = jax.lax.scan(hop, carry, _hops(spec))
    out = out.astype(v.dtype)
    out, lse = keep(out, lse)
    return (out, lse), (q, k, v, queries, keys, out, lse)


def _backward(spec, saved, cotangents):
    q, k, v, queries, keys, out, lse = saved
    d_out, d_lse = cotangents
    wide = lse.dtype
    # out = Σ w_s out_s over the shards s with w_s = exp(lse_s - lse), so that d_out_s = w_s d_out and
    # d_lse_s = w_s (d_out · (out_s - out) + d_lse).
    common = d_lse - jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)

    def tile(spec, hops, q, k, v, queries, keys):
        (out, lse_here), pull = jax.vjp(
            lambda q, k, v: _tile(spec, hops, q, k, v, queries, keys), q, k, v
        )
        share = _share(lse_here, lse)
        d_out_here = share[..., None] * d_out.astype(wide)
        d_lse_here = jnp.sum(d_out_here * out.astype(wide), axis=-1) + share * common
        return _widened(pull((d_out_here.astype(out.dtype), d_lse_here)), wide)

    def none(spec, q, k, v, queries, keys):
        return _widened(jax.tree.map(jnp.zeros_like, (q, k, v)), wide)

    def hop(carry, hops):
        dq, d_keys, here = carry
        coming, d_keys = _onward(spec, here), _onward(spec, d_keys)
        found = _where_seen(spec, hops, tile, none, (q, *here[:2], queries, here[2]))
        return (dq + found[0], jax.tree.map(jnp.add, d_keys, found[1:]), coming), None

    coming = _onward(spec, (k, v, keys))
    dq, *d_keys = tile(spec, 0, q, k, v, queries, keys)
    (dq, d_keys, _), _ = jax.lax.scan(hop, (dq, tuple(d_keys), coming), _hops(spec))
    dk, dv = _onward(spec, d_keys)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)


def _hops(spec):
    """How far the keys at hand have come, step after step, those of the device itself left out."""
    return jnp.arange(1, jax.lax.axis_size(spec.axis_name))


def _onward(spec, arrays):
    """Passes arrays on to the next device of the ring, and takes those of the one before."""
    size = jax.lax.axis_size(spec.axis_name)
    return jax.lax.ppermute(arrays, spec.axis_name, [(i, (i + 1) % size) for i in range(size)])


def _where_seen(spec, hops, function, otherwise, arguments):
    """`function` of the keys that came `hops` devices far, unless all of them are later than the queries."""
    if not spec.causal or arguments[3].position is not None:
        return function(spec, hops, *arguments)
    return jax.lax.cond(
        hops <= jax.lax.axis_index(spec.axis_name),
        functools.partial(function, spec, hops),
        functools.partial(otherwise, spec),
        *arguments,
    )


def _tile(spec, hops, q, k, v, queries, keys):
    """`(out, lse)` of queries and keys that are here."""
    is_own = isinstance(hops, int)
    causal = spec.causal and (is_own or queries.position is not None)
    return spec.attend(q, k, v, queries, keys, causal=causal, window=spec.window)


def _nothing(spec, q, k, v, queries, keys):
    """`(out, lse)` of queries that see no key."""
    out = jnp.zeros_like(q, v.dtype, shape=(*q.shape[:3], v.shape[3]))
    lse = jnp.zeros_like(q, jnp.promote_types(q.dtype, jnp.float32), shape=q.shape[:3])
    return out, lse - jnp.inf


def _merged(so_far, found):
    """`(out, lse)` over the keys of both, in the log-sum-exp's dtype."""
    (out, lse), (other, other_lse) = so_far, found
    total = jnp.logaddexp(lse, other_lse)
    shares = _share(lse, total)[..., None], _share(other_lse, total)[..., None]
    return shares[0] * out + shares[1] * other.astype(out.dtype), total


def _share(lse, total):
    """exp(lse - total): the share of some keys in the softmax; 0 where a query sees none of them."""
    none = jnp.isneginf(lse)
    return jnp.where(none, 0, jnp.exp(jnp.where(none, 0, lse) - jnp.where(none, 0, total)))


def _widened(arrays, dtype):
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, dtype)), arrays)
