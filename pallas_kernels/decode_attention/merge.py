"""Softmaxes over parts of the keys, merged into the softmax over all of them."""

import jax.numpy as jnp


def merge(out, lse):
    """Merges over axis 1: out [B, parts, rows, Dv] and lse [B, parts, rows, 1] -> [B, rows, Dv] and [B, rows, 1].

    A part weighs exp of its log-sum-exp (Dao et al., "Flash-Decoding", 2023). Parts of log-sum-exp -inf are empty.
    """
    highest = lse.max(axis=1, keepdims=True)
    # Where all parts are empty the difference of infinities would be NaN.
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(highest), 0, highest))
    total = weights.sum(axis=1)
    out = (out * weights).sum(axis=1) / jnp.where(total == 0, 1, total)
    return out, highest[:, 0] + jnp.log(total)
