"""A language model whose logits are known in closed form: row `token` of a table."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from effjax.models import Output


class TableModel(nn.Module):
    """logits[b, t] = table[tokens[b, t]]; reports one scalar and one number a token."""

    vocab_size: int

    @nn.compact
    def __call__(self, tokens, *, positions=None, segment_ids=None, train=False):
        shape = (self.vocab_size, self.vocab_size)
        table = self.param("table", nn.initializers.zeros_init(), shape, jnp.float32)
        logits = table[tokens]
        metrics = {
            "flops/spent": jnp.mean(tokens.astype(jnp.float32)),
            "flops/full": jnp.float32(7.0),
            "token/depth": (tokens % 3 + 1).astype(jnp.float32),
        }
        return Output(hidden=logits, aux={}, metrics=metrics, logits=logits)


def text_batch(rng, rows, length, vocab_size, padded_rows=0):
    """A batch of random text with two documents a row, a ragged end, and whole rows of padding last."""
    segment_ids = np.zeros((rows + padded_rows, length), np.int32)
    positions = np.zeros_like(segment_ids)
    for row in range(rows):
        first, last = sorted(rng.choice(np.arange(1, length + 1), 2, replace=False))
        segment_ids[row, :first], segment_ids[row, first:last] = 1, 2
        positions[row, :first] = np.arange(first)
        positions[row, first:last] = np.arange(last - first)
    loss_mask = (segment_ids > 0) & (rng.random(segment_ids.shape) < 0.8)
    loss_mask[0, 0] = True
    shape = segment_ids.shape
    return {
        "tokens": rng.integers(vocab_size, size=shape, dtype=np.int32),
        "targets": rng.integers(vocab_size, size=shape, dtype=np.int32),
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_mask": loss_mask.astype(np.float32),
    }
