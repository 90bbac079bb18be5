"""Llama blocks and depth routing, one row and one token at a time, in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.depth import Block, Stack
from effjax.ffn import Gated
from effjax.mixers import Attention
from effjax.nn import RMSNorm

D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 16, 2, 1, 8


def make_stack(num_layers, remat="none", scan_layers=False):
    # Attention's other implementations have tests of their own; this one compiles fastest.
    blocks = tuple(
        Block(
            Attention(HEADS, KV_HEADS, implementation="reference"),
            Gated(hidden_dim=24),
            RMSNorm(),
            RMSNorm(),
            parent=None,
        )
        for _ in range(num_layers)
    )
    return Stack(blocks, remat, scan_layers, parent=None)


def packed(rng, rows=3, length=12):
    """Random hidden states in rows of two packed segments with a little padding, and their masks."""
    x = rng.normal(size=(rows, length, D_MODEL)).astype(np.float32)
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cut, end = np.sort(rng.choice(np.arange(2, length), size=2, replace=False))
        segment_ids[row, :cut], segment_ids[row, cut:end] = 1, 2
        positions[row, :end] = np.concatenate([np.arange(cut), np.arange(end - cut)])
    return x, positions, segment_ids


@functools.cache
def compiled(policy, num_layers, remat, scan_layers):
    """A policy under jit, compiled once for all tests of a process."""
    stack = make_stack(num_layers, remat, scan_layers)

    def apply(train, variables, x, positions, segment_ids):
        x, _, aux = policy.apply(
            variables, stack, x, positions=positions, segment_ids=segment_ids, train=train
        )
        return x, aux

    return jax.jit(apply, static_argnums=0)


def init(policy, num_layers, rng, inputs, router_scale=1.0):
    """Random parameters; the norms' scales too, so that no block could be taken for another."""
    x, positions, segment_ids = inputs
    shapes = jax.eval_shape(
        lambda key: policy.init(
            key, make_stack(num_layers), x, positions=positions, segment_ids=segment_ids
        ),
        jax.random.key(0),
    )

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if "balance_bias" in name:
            return np.zeros(leaf.shape, np.float32)
        deviation = 0.02 * router_scale if "router" in name else leaf.shape[0] ** -0.5
        return (deviation * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(policy, variables, inputs, num_layers, train, remat="none", scan_layers=False):
    """The policy under jit, on (x, positions, segment_ids)."""
    apply = compiled(policy, num_layers, remat, scan_layers)
    x, aux = apply(train, variables, *inputs)
    return np.asarray(x), {name: np.asarray(value, np.float64) for name, value in aux.items()}


def gradients(policy, variables, inputs, num_layers, probe, remat="none", scan_layers=False):
    """Of a random linear functional of the result (padding left out) plus the auxiliary losses."""
    apply = compiled(policy, num_layers, remat, scan_layers)

    def loss(variables):
        y, aux = apply(True, variables, *inputs)
        losses = sum(value for name, value in aux.items() if name.startswith("loss/"))
        return jnp.sum(y * probe * (inputs[2] > 0)[..., None]) + losses

    return jax.jit(jax.grad(loss))(variables)


def assert_all_learn(gradients):
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name


def rms_norm(p, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["scale"]


def rotate(x, position):
    half = HEAD_DIM // 2
    angle = position * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def block(p, x, positions, segment_ids, active, shared=None):
    """One layer on the active tokens of a row [T, D].

    `shared`: (keys, values, the tokens that have some) to attend to instead of the active tokens' own.
    Returns the layer's output, equal to x for tokens that are not active, and that triple.
    """
    h = rms_norm(p["mixer_norm"], x)
    kernel = lambda name: np.asarray(p["mixer"][name]["kernel"], np.float64)  # noqa: E731
    keys = [
        rotate((h[t] @ kernel("key")).reshape(KV_HEADS, HEAD_DIM), positions[t])
        for t in range(len(x))
    ]
    values = (h @ kernel("value")).reshape(-1, KV_HEADS, HEAD_DIM)
    keys, values, known = shared if shared is not None else (np.stack(keys), values, active)
    y = x.copy()
    for t in np.flatnonzero(active):
        seen = [s for s in range(t + 1) if known[s] and segment_ids[s] == segment_ids[t]]
        query = rotate((h[t] @ kernel("query")).reshape(HEADS, HEAD_DIM), positions[t])
        heads = []
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            logits = np.array([query[head] @ keys[s, group] for s in seen]) / np.sqrt(HEAD_DIM)
            weights = np.exp(logits - logits.max())
            heads.append(weights / weights.sum() @ values[seen, group])
        y[t] = x[t] + np.concatenate(heads) @ kernel("out")
    h = rms_norm(p["ffn_norm"], y)
    ffn = {
        name: np.asarray(p["ffn"][name]["kernel"], np.float64) for name in ("gate", "up", "down")
    }
    gate = h @ ffn["gate"]
    update = (gate / (1 + np.exp(-gate)) * (h @ ffn["up"])) @ ffn["down"]
    return np.where(active[:, None], y + update, x), (keys, values, known)


def blocks(p, x, positions, segment_ids, active, shared=None):
    """All layers of a stack; `shared` is one entry a layer."""
    kept = []
    for i in range(len(p)):
        x, state = block(
            p[f"blocks_{i}"],
            x,
            positions,
            segment_ids,
            active,
            None if shared is None else shared[i],
        )
        kept.append(state)
    return x, kept


def expert_choice(p, x, positions, segment_ids, *, capacities, alpha, train, shared_kv):
    """One row of Mixture-of-Recursions by expert choice, middle-cycle. Returns (x, depth, mean BCE terms)."""
    real = segment_ids > 0
    x, _ = blocks(p["first"], x.astype(np.float64), positions, segment_ids, real)
    active, depth, kept, errors, before = real, np.zeros(len(x)), None, [], 1.0
    for r, capacity in enumerate(capacities):
        scores = x @ np.asarray(p["routing"][f"router_{r}"]["router"]["kernel"], np.float64)[:, 0]
        if train:
            count = max(1, int(capacity * real.sum() + 1e-9)) if real.any() else 0
            best = sorted(np.flatnonzero(active), key=lambda t: -scores[t])[:count]
            chosen = np.isin(np.arange(len(x)), best)
        else:
            chosen = active & ((scores > 0) | (capacity == before))
        probability = 1 / (1 + np.exp(-scores))
        errors.append(
            [
                -np.log(probability[t] if chosen[t] else 1 - probability[t])
                for t in np.flatnonzero(active)
            ]
        )
        y, state = blocks(p["shared"], x, positions, segment_ids, chosen, kept)
        kept = state if shared_kv and kept is None else kept
        x = np.where(chosen[:, None], x + alpha * probability[:, None] * y, x)
        depth, active, before = depth + chosen, chosen, capacity
    x, _ = blocks(p["last"], x, positions, segment_ids, real)
    return x, depth, errors


def token_choice(p, x, positions, segment_ids, *, num_recursions, sizes, shared_kv, bias=0.0):
    """One row of Mixture-of-Recursions by token choice, middle-cycle: (x, depth, wanted depth, probabilities)."""
    real = segment_ids > 0
    x, _ = blocks(p["first"], x.astype(np.float64), positions, segment_ids, real)
    logits = x @ np.asarray(p["routing"]["router"]["router"]["kernel"], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.where(real, np.argmax(probabilities + bias, -1) + 1, 0)
    depth = np.zeros(len(x), int)
    for r in range(num_recursions):
        room = sizes[r]
        for t in range(len(x)):
            if wanted[t] > r and depth[t] == r and room:
                depth[t], room = r + 1, room - 1
    start, kept = x, None
    for r in range(num_recursions):
        y, state = blocks(p["shared"], x, positions, segment_ids, depth > r, kept)
        kept = state if shared_kv and kept is None else kept
        last = depth == r + 1
        x = y.copy()
        for t in np.flatnonzero(last):
            x[t] = start[t] + probabilities[t, r] * y[t]
    x, _ = blocks(p["last"], x, positions, segment_ids, real)
    return x, depth, wanted, probabilities
