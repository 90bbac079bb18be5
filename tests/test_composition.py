"""The promise: any mixer x any feed-forward x any depth policy x any head is a model that trains and is saved whole."""

import itertools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import random_variables

from effjax import pytree, registry
from effjax.checkpoint import Checkpoints
from effjax.data import build
from effjax.models import SequenceModel
from effjax.training.state import TrainState
from effjax.training.step import make_train_step

ROWS, LENGTH, VOCAB, CLASSES = 4, 12, 32, 3
KINDS = ("mixer", "ffn", "depth", "head")
EVERY_TWO = tuple(itertools.combinations(KINDS, 2))
# The others meet only through hidden states that a depth policy hands from one to the other.
NEIGHBOURS = (("mixer", "ffn"), ("mixer", "depth"), ("ffn", "depth"), ("depth", "head"))
SMALL = {
    "attention": {"num_heads": 2, "num_kv_heads": 1},
    "sliding_window": {"num_heads": 2, "window": 4},
    "taylor_linear": {"num_heads": 2, "feature_dim": 4},
    "mamba": {"state_dim": 4},
    "mamba2": {"head_dim": 8, "state_dim": 4},
    "dense": {"hidden_dim": 8},
    "gated": {"hidden_dim": 8},
    "switch": {"num_experts": 4, "hidden_dim": 8},
    "adamoe": {"num_experts": 4, "num_null": 4, "hidden_dim": 8},
    "top_k": {"num_experts": 4, "hidden_dim": 8},
    "recursive": {"num_recursions": 2, "sharing": "cycle"},
    "mixture_of_recursions": {"num_recursions": 2, "sharing": "cycle"},
    "matryoshka_classifier": {"num_classes": CLASSES, "dims": (4, 16)},
}
VARIANTS = {
    "mixture_of_recursions": [
        {},
        {"kv_sharing": "shared"},
        {"routing": {"name": "token_choice", "balancing": "loss_free"}},
    ],
}
COSTLY = ("mixture_of_recursions", "recursive", "embedding", "matryoshka_classifier")
OBJECTIVES = {"embedding": "contrastive", "matryoshka_classifier": "classification"}


def parts(kind):
    """Every part of a kind, its variants included, as (id, part)."""
    for name in registry.names(kind):
        for i, variant in enumerate(VARIANTS.get(name, [{}])):
            spec = {"name": name, **SMALL.get(name, {}), **variant}
            yield f"{name}:{i}" if i else name, registry.build(kind, spec)


def couples():
    """The mixers, two and two: layers alternate between them, so that one model has both."""
    mixers = sorted(parts("mixer"), key=lambda p: not getattr(p[1], "shares_state", False))
    mixers += mixers[: len(mixers) % 2]
    for (name, mixer), (other_name, other) in zip(mixers[::2], mixers[1::2], strict=True):
        yield f"{name}+{other_name}", (mixer, other)


def composes(mixers, ffn, depth, head):
    """Keys that recursions share can only come from mixers with keys; others are refused: tests/depth."""
    return getattr(depth, "kv_sharing", "") != "shared" or all(
        getattr(mixer, "shares_state", False) for mixer in mixers
    )


def models():
    """So few models that parts of two kinds that have to do with each other all meet, a variant standing for its part.

    Those in which every two parts of different kinds meet, variants too, are for `-m slow`.
    """
    rows = [
        dict(zip(KINDS, row, strict=True))
        for row in itertools.product(couples(), *map(parts, KINDS[1:]))
        if composes(*(part for _, part in row))
    ]
    # Of models with as many new pairs, the one that compiles fastest.
    rows.sort(key=lambda row: sum(name.split(":")[0] in COSTLY for name, _ in row.values()))
    by_part = [_pairs(row, lambda name: name.split(":")[0], NEIGHBOURS) for row in rows]
    by_variant = [_pairs(row, lambda name: name) for row in rows]
    chosen = _cover(by_part, [])
    more = _cover(by_variant, chosen)
    for index in chosen + more:
        names, row = zip(*rows[index].values(), strict=True)
        marks = [pytest.mark.slow] if index in more else []
        yield pytest.param(dict(zip(KINDS, row, strict=True)), id="-".join(names), marks=marks)


def _pairs(row, name_of, kinds=EVERY_TWO):
    named = [(kind, name_of(n)) for kind, (name, _) in row.items() for n in name.split("+")]
    pairs = itertools.combinations(named, 2)
    return {(one, other) for one, other in pairs if (one[0], other[0]) in kinds}


def _cover(pairs, already):
    """Indices that cover all pairs together with those given: each the one with the most pairs to come."""
    missing = set().union(*pairs).difference(*(pairs[i] for i in already))
    chosen = []
    while missing:
        chosen.append(max(range(len(pairs)), key=lambda i: len(pairs[i] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def make_batch(head, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCAB, size=(ROWS, LENGTH + 1), dtype=np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[:, LENGTH // 2 :] = 2
    segments[-1, -2:] = 0
    text = (segments > 0).astype(np.int32)
    return {
        "next_token": {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": segments,
            "positions": np.tile(np.arange(LENGTH, dtype=np.int32) % (LENGTH // 2), (ROWS, 1)),
            "loss_mask": text.astype(np.float32),
        },
        "contrastive": {
            "query_tokens": tokens[:, :-1],
            "query_segment_ids": text,
            "document_tokens": tokens[:, 1:],
            "document_segment_ids": text,
        },
        "classification": {
            "tokens": tokens[:, 1:],
            "segment_ids": text,
            "labels": rng.integers(CLASSES, size=ROWS, dtype=np.int32),
        },
    }[OBJECTIVES.get(registry.describe(head)["name"], "next_token")]


def objective_for(head):
    return registry.build(
        "objective", OBJECTIVES.get(registry.describe(head)["name"], "next_token")
    )


@pytest.mark.parametrize("part", list(models()))
def test_every_pair_trains_and_is_saved_whole(part, tmp_path):
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    mixers = part["mixer"]
    model = SequenceModel(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=len(mixers) * getattr(part["depth"], "num_recursions", 1),
        max_seq_len=LENGTH,
        mixers=mixers,
        ffn=part["ffn"],
        depth=part["depth"],
        head=part["head"],
    )
    batch = make_batch(part["head"], seed)
    optimizer = optax.sgd(1.0)  # so that a step is the gradient
    # Shapes are those of `model.init`; values drawn in NumPy spare the compilation of its random bits.
    params = random_variables(model, np.random.default_rng(seed))["params"]
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=None,
        rng=jax.random.key_data(jax.random.key(seed)),
    )
    step = make_train_step(model, objective_for(part["head"]), optimizer)
    after, metrics = jax.jit(step)(state, batch)
    moved = jax.device_get(after.params)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert 0 < metrics["flops/spent"] <= metrics["flops/full"] * 1.01 + 1e3
    for path, old, new in zip(
        pytree.paths(params), jax.tree.leaves(params), jax.tree.leaves(moved), strict=True
    ):
        assert np.isfinite(new).all(), path
        assert (old != new).any(), f"{path} has no gradient"

    text = tmp_path / "text.txt"
    text.write_text("some text to iterate over\n" * 40)
    source = {"name": "text", "paths": (str(text),), "separator": "\n"}
    rows = {"seq_len": LENGTH, "batch_size": ROWS, "shuffle_window": 8}
    data = iter(build({"source": source, **rows}, split="train"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(after, data, {})
        checkpoints.wait()
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), after
        )
        restored, _ = checkpoints.restore(like, data)
    jax.tree.map(np.testing.assert_array_equal, restored, after)
