"""The training benchmark: this library's side is the model that its task describes."""

import math

import numpy as np

from benchmarks.training import ours, task


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def attention(q, k, v):
    """Causal, [T, D] of one head."""
    weights = np.exp(q @ k.T / math.sqrt(q.shape[1])) * np.tri(len(q))
    return weights / weights.sum(-1, keepdims=True) @ v


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def loss_of_row(w, tokens, targets):
    x = w["embedding"][tokens] + w["position"]
    for i in range(task.LAYERS):
        q, k, v = (norm(x) @ w[f"{i}/{name}"] for name in ("query", "key", "value"))
        heads = (np.split(y, task.HEADS, axis=1) for y in (q, k, v))
        mixed = np.concatenate([attention(*head) for head in zip(*heads, strict=True)], axis=1)
        x = x + mixed @ w[f"{i}/out"]
        x = x + gelu(norm(x) @ w[f"{i}/up"]) @ w[f"{i}/down"]
    logits = norm(x) @ w["embedding"].T
    return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets])


def test_the_first_loss_is_that_of_a_gpt_in_numpy(monkeypatch):
    sizes = {"LAYERS": 2, "WIDTH": 16, "HEADS": 2, "LENGTH": 12, "BATCH": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(task, name, size)
    training = ours.Training()
    losses = training.run(2)
    weights = {name: x.astype(np.float64) for name, x in task.weights().items()}
    want = np.mean([loss_of_row(weights, *row) for row in zip(*task.batch(0), strict=True)])
    np.testing.assert_allclose(losses[0], want, rtol=1e-5)
    assert losses[1] != losses[0]
    # Two norms of a layer and the last one.
    assert training.num_parameters() == sum(x.size for x in weights.values()) + 16 * 5
