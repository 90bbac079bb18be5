"""Cross-entropy over chunks of the vocabulary is that of all logits, without their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.objectives import next_token

VOCAB, LENGTH = 4096, 64


def model_of(head, chunk_size, soft_cap):
    return models.create(
        "transformer",
        d_model=16,
        num_layers=1,
        vocab_size=VOCAB,
        max_seq_len=LENGTH,
        head={"name": head, "chunk_size": chunk_size, "soft_cap": soft_cap},
    )


def batch_of(rng):
    tokens = rng.integers(VOCAB, size=(4, LENGTH + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (4, 1)),
        "segment_ids": np.ones((4, LENGTH), np.int32),
        "loss_mask": rng.integers(2, size=(4, LENGTH)).astype(np.float32),
    }


@pytest.mark.parametrize(("head", "soft_cap"), [("tied", None), ("untied", 0.5)])
def test_chunks_of_the_vocabulary_give_the_same_loss_in_less_memory(head, soft_cap, rng):
    batch = batch_of(rng)
    params = model_of(head, None, soft_cap).init(jax.random.key(0), batch["tokens"])["params"]

    def compiled(chunk_size):
        def loss(params):
            model = model_of(head, chunk_size, soft_cap)
            return next_token(model, {"params": params}, batch, None, z_loss=0.1)[0]

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    whole, chunked = compiled(None), compiled(300)
    logits = 4 * batch["tokens"].size * VOCAB
    memory = [x.memory_analysis().temp_size_in_bytes for x in (whole, chunked)]
    assert memory[1] < logits < memory[0]
    for want, got in zip(
        jax.tree.leaves(whole(params)), jax.tree.leaves(chunked(params)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))
