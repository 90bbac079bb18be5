"""Attention whose time axis is split over a mesh axis: no device ever holds the keys of another for longer than a step.

Keys and values travel once around the ring of devices, while each device keeps its queries and adds up what it has seen
by the log-sum-exp (Liu et al., "Ring attention with blockwise transformers", arXiv 2310.01889). So the memory of a
device, forward and backward, is that of its own share, and the next keys are on their way while the present ones are at
work. The backward pass goes around once more: the keys collect their gradients on the way, and are home again with all
of them.

Causal attention in index order would keep the last device busy all the way and the first none of it. So the row is
dealt out anew first: cut into two chunks a device, of which device i gets the i-th and the i-th from the end (Llama
Team, "The Llama 3 herd of models", arXiv 2407.21783, section 3.3.2). Of the keys of another device then either all
queries see the first half, or half of the queries see all: every hop takes every device as long, and half as long as an
unmasked one. No tile of a causal mask is cut but on the diagonal.

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

# `(q, k, v, queries, keys, *, causal, window, known) -> (out, lse)` for arrays of one device; no positions mean index
# order. Of `known`, which are the `(out, lse)` over more keys, the gradients are those that belong to these.
Attend = Callable[..., tuple[jax.Array, jax.Array]]


class _Part(NamedTuple):
    """The halves from `start` to `stop` of what a device has along the time axis."""

    start: int
    stop: int

    def cut(self, arrays):
        """The part of each [B, T, ...]."""

        def one(x):
            return x[:, self.start * x.shape[1] // 2 : self.stop * x.shape[1] // 2]

        return jax.tree.map(one, arrays)

    def filled_up(self, x, value):
        """The part as long as all of it, with `value` in what is missing."""
        half = x.shape[1] // (self.stop - self.start)
        missing = (self.start * half, (2 - self.stop) * half)
        return jnp.pad(x, [(0, 0), missing, *[(0, 0)] * (x.ndim - 2)], constant_values=value)


_ALL, _FIRST, _SECOND = _Part(0, 2), _Part(0, 1), _Part(1, 2)


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
    arrays = vary_alike((q, k, v, queries, keys))
    if not causal or queries.position is not None:
        return _ring(spec, *arrays)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention: with axis_name, Tq={q.shape[1]} and Tk={k.shape[1]} must agree, or give positions"
        )
    if window is not None:
        return _from_nearest(spec, q, k, v, queries, keys)
    if q.shape[1] % 2:  # has no halves to deal out
        return _ring(spec, *arrays[:3], *(_with_positions(spec, x, q) for x in arrays[3:]))
    dealt = jax.tree.map(functools.partial(_deal, spec), arrays)
    return jax.tree.map(functools.partial(_take_back, spec), _ring(spec, *dealt))


def _deal(spec, x):
    """Halves c = 2i and 2i+1 of device i to where they belong: c to device c of the n, or to 2n-1-c."""
    here = jax.lax.axis_index(spec.axis_name)
    even, odd = (
        jax.lax.ppermute(half, spec.axis_name, list(enumerate(_holders(spec, parity))))
        for parity, half in enumerate(jnp.split(x, 2, axis=1))
    )
    first, second = (jnp.where(here % 2 == parity, even, odd) for parity in (0, 1))
    return jnp.concatenate([first, second], axis=1)


def _take_back(spec, x):
    """Undoes `_deal`."""
    here = jax.lax.axis_index(spec.axis_name)
    first, second = jnp.split(x, 2, axis=1)
    halves = []
    for parity in (0, 1):
        half = jnp.where(here % 2 == parity, first, second)
        home = [(holder, i) for i, holder in enumerate(_holders(spec, parity))]
        halves.append(jax.lax.ppermute(half, spec.axis_name, home))
    return jnp.concatenate(halves, axis=1)


def _holders(spec, parity):
    """The devices that the even or odd halves of all go to, in order."""
    size = jax.lax.axis_size(spec.axis_name)
    return [min(c, 2 * size - 1 - c) for c in range(parity, 2 * size, 2)]


def _with_positions(spec, tokens, x):
    """Tokens in index order with their positions, which masks then have to be made from."""
    position = jax.lax.axis_index(spec.axis_name) * x.shape[1] + jnp.arange(x.shape[1])
    return tokens._replace(position=position[None])


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

    def tile(rows, columns, *arguments):
        out, lse = _tile(spec, rows, columns, *arguments)
        return rows.filled_up(out, 0), rows.filled_up(lse, -jnp.inf)

    def hop(carry, hops):
        out, lse, here = carry
        coming = _onward(spec, here)
        found = _where_seen(spec, hops, tile, (q, *here[:2], queries, here[2]))
        return (*_merged((out, lse), found), coming), None

    coming = _onward(spec, own)
    out, lse = _own_tile(spec, q, k, v, queries, keys)
    carry = (out.astype(lse.dtype), lse, coming)
    (out, lse, _), _ = jax.lax.scan(hop, carry, _hops(spec))
    out = out.astype(v.dtype)
    out, lse = keep(out, lse)
    return (out, lse), (q, k, v, queries, keys, out, lse)


def _backward(spec, saved, cotangents):
    q, k, v, queries, keys, out, lse = saved
    d_out, d_lse = cotangents
    wide = lse.dtype

    def gradients(tile, rows, q, k, v, queries, keys):
        known = rows.cut((out, lse))
        _, pull = jax.vjp(lambda *x: tile(*x, queries, keys, known=known), q, k, v)
        return _widened(pull(rows.cut((d_out, d_lse))), wide)

    def tile(rows, columns, *arguments):
        return gradients(functools.partial(_tile, spec, rows, columns), rows, *arguments)

    def hop(carry, hops):
        dq, d_keys, here = carry
        coming, d_keys = _onward(spec, here), _onward(spec, d_keys)
        found = _where_seen(spec, hops, tile, (q, *here[:2], queries, here[2]))
        return (dq + found[0], jax.tree.map(jnp.add, d_keys, found[1:]), coming), None

    coming = _onward(spec, (k, v, keys))
    dq, *d_keys = gradients(functools.partial(_own_tile, spec), _ALL, q, k, v, queries, keys)
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


def _where_seen(spec, hops, function, arguments):
    """`function` of the part of the queries that sees keys which came `hops` devices far, and the part of these."""
    if not spec.causal or arguments[3].position is not None:
        return function(_ALL, _ALL, *arguments)
    return jax.lax.cond(
        hops <= jax.lax.axis_index(spec.axis_name),
        functools.partial(function, _ALL, _FIRST),
        functools.partial(function, _SECOND, _ALL),
        *arguments,
    )


def _own_tile(spec, *arguments, known=None):
    """`(out, lse)` of the queries and keys of one device."""
    return spec.attend(*arguments, causal=spec.causal, window=spec.window, known=known)


def _tile(spec, rows, columns, q, k, v, queries, keys, known=None):
    """`(out, lse)` of a part of the queries, and of the keys of another device, of which they see all."""
    (q, queries), (k, v, keys) = rows.cut((q, queries)), columns.cut((k, v, keys))
    causal = spec.causal and queries.position is not None
    return spec.attend(q, k, v, queries, keys, causal=causal, window=spec.window, known=known)


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
