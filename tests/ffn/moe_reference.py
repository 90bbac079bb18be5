"""Mixtures of experts one token at a time, in float64 NumPy."""

import dataclasses

import numpy as np

ACTIVATIONS = {"silu": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0)}


@dataclasses.dataclass
class Outcome:
    """What the loops computed: `y` [B, T, D], `used` [B, T], and the parts of the report."""

    y: np.ndarray
    used: np.ndarray
    dropped: int
    chosen: int
    balance: float
    z: float
    entropy: float
    imbalance: float


def forward(params, x, *, k, num_null=0, capacity=None, renormalise=True, activation="silu"):
    """Routes token by token; an expert that has taken `capacity` tokens of a row takes no more."""
    router, experts = params["router"]["kernel"], params["experts"]
    total = router.shape[1]
    num_experts = total - num_null
    y, used = np.zeros_like(x), np.zeros(x.shape[:2])
    counts, mass = np.zeros(total), np.zeros(total)
    z, entropy, dropped = [], [], 0
    for b in range(x.shape[0]):
        taken = np.zeros(num_experts, int)
        for t in range(x.shape[1]):
            logits = x[b, t] @ router
            probs = np.exp(logits - logits.max())
            probs /= probs.sum()
            z.append((np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()) ** 2)
            entropy.append(-np.sum(probs * np.log(probs)))
            mass += probs
            chosen = np.argsort(-logits)[:k]
            counts[chosen] += 1
            true = [e for e in chosen if e < num_experts]
            norm = sum(probs[e] for e in true) if renormalise else 1.0
            for e in true:
                if capacity is not None and taken[e] >= capacity:
                    dropped += 1
                    continue
                taken[e] += 1
                used[b, t] += 1
                y[b, t] += probs[e] / norm * expert(experts, e, x[b, t], activation)
    f = counts / counts.sum()
    if num_null:
        f[num_experts:] = f[num_experts:].mean()
    true = counts[:num_experts]
    return Outcome(
        y=y,
        used=used,
        dropped=dropped,
        chosen=int(true.sum()),
        balance=total * np.sum(f * mass) / used.size,
        z=np.mean(z),
        entropy=np.mean(entropy),
        imbalance=true.max() / true.mean(),
    )


def expert(experts, e, x, activation):
    """One feed-forward on one token."""
    hidden = x @ experts["up"][e]
    if "gate" in experts:
        hidden = ACTIVATIONS[activation](x @ experts["gate"][e]) * hidden
    else:
        hidden = ACTIVATIONS[activation](hidden)
    return hidden @ experts["down"][e]
