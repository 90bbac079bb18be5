import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from effjax import models, registry
from effjax.objectives.contrastive import info_nce

LENGTH = 6


def reference_info_nce(q, d, keep, temperature, symmetric):
    """Mean loss and accuracy over the pairs, in float64; keep[i, j]: document j is a candidate of query i."""
    q, d = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, d))
    directions = []
    for scores, candidates in (((q @ d.T), keep), ((d @ q.T), keep.T)):
        per_pair = []
        for i, row in enumerate(scores / temperature):
            others = row[candidates[i]]
            per_pair.append(np.log(np.sum(np.exp(others - row[i]))))
        directions.append(np.mean(per_pair))
    best = [max(np.flatnonzero(keep[i]), key=lambda j: q[i] @ d[j]) for i in range(len(q))]
    loss = np.mean(directions) if symmetric else directions[0]
    return loss, np.mean(np.array(best) == np.arange(len(q)))


def objective_of(**fields):
    return registry.build("objective", {"name": "contrastive", **fields})


def evaluate(objective, model, variables, batch):
    return jax.jit(lambda variables, batch: objective(model, variables, batch, None))(
        variables, batch
    )


@pytest.fixture
def model():
    return models.create("matryoshka", num_layers=1, d_model=16)


@pytest.fixture
def pairs(rng):
    """Six pairs: 0 and 1 share the query, 1 and 2 the document, and 4 has no document."""
    batch = {}
    for side in ("query", "document"):
        lengths = rng.integers(2, LENGTH + 1, size=6)
        tokens = rng.integers(256, size=(6, LENGTH))
        batch[f"{side}_tokens"] = tokens.astype(np.int32)
        batch[f"{side}_segment_ids"] = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    _copy_row(batch, "query", 0, 1)
    _copy_row(batch, "document", 1, 2)
    batch["document_segment_ids"][4] = 0
    return batch


def _copy_row(batch, side, source, target):
    for name in ("tokens", "segment_ids"):
        batch[f"{side}_{name}"][target] = batch[f"{side}_{name}"][source]
    length = batch[f"{side}_segment_ids"][source].sum()
    batch[f"{side}_tokens"][target, length:] += (
        1  # what is in the padding does not make a difference
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dims", [None, (2, 5, 16)])
def test_loss_by_hand(model, pairs, symmetric, dims):
    variables = jax.jit(model.init)(jax.random.key(0), pairs["query_tokens"])
    weights = None if dims is None else (1.0, 0.5, 2.0)
    objective = objective_of(
        temperature=0.2, symmetric=symmetric, matryoshka_dims=dims, matryoshka_weights=weights
    )
    loss, metrics = evaluate(objective, model, variables, pairs)
    rows = [0, 1, 2, 3, 5]
    q, d = (
        np.asarray(
            jax.jit(model.apply)(
                variables, pairs[f"{side}_tokens"], segment_ids=pairs[f"{side}_segment_ids"]
            ).embeddings,
            np.float64,
        )[rows]
        for side in ("query", "document")
    )
    keep = np.ones((5, 5), bool)
    keep[0, 1] = keep[1, 0] = keep[1, 2] = keep[2, 1] = False
    expected = 0.0
    for m, importance in zip(dims or (16,), weights or (1.0,), strict=True):
        nats, accuracy = reference_info_nce(q[:, :m], d[:, :m], keep, 0.2, symmetric)
        suffix = "" if dims is None else f"/{m}"
        np.testing.assert_allclose(metrics[f"contrastive{suffix}"], nats, rtol=1e-4)
        np.testing.assert_allclose(metrics[f"accuracy{suffix}"], accuracy, rtol=1e-6)
        expected += importance * nats
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert metrics["weight"] == 5.0
    assert metrics["flops/spent"] > 0
    assert all(jnp.ndim(value) == 0 for value in metrics.values())


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_against_finite_differences(rng, symmetric):
    with jax.enable_x64(True):
        q, d = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(2))
        negatives = jnp.asarray(~np.eye(4, k=1, dtype=bool) & ~np.eye(4, k=-1, dtype=bool))
        valid = jnp.asarray([True, True, True, False])

        def loss(q, d):
            return info_nce(q, d, negatives, valid, temperature=0.5, symmetric=symmetric)[0]

        check_grads(loss, (q, d), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_far_pairs_have_no_loss_and_equal_embeddings_have_log_of_the_batch():
    valid, negatives = jnp.ones(8, bool), jnp.ones((8, 8), bool)
    options = {"temperature": 0.01, "symmetric": True}
    apart, metrics = info_nce(jnp.eye(8), jnp.eye(8), negatives, valid, **options)
    assert apart < 1e-6 and metrics["accuracy"] == 1.0
    same = jnp.ones((8, 1))
    together, _ = info_nce(same, same, negatives, valid, **options)
    np.testing.assert_allclose(together, np.log(8), rtol=1e-5)


def test_auxiliary_losses_are_added(model, pairs):
    """A model reports a loss of its own; the objective's loss grows by exactly that."""
    variables = jax.jit(model.init)(jax.random.key(0), pairs["query_tokens"])
    plain, _ = evaluate(objective_of(), model, variables, pairs)
    extra, metrics = evaluate(objective_of(), _WithLoss(model), variables, pairs)
    np.testing.assert_allclose(extra - plain, 0.75, rtol=1e-4)
    assert metrics["loss/extra"] == 0.75


class _WithLoss:
    def __init__(self, model):
        self.model = model

    def apply(self, *args, **kwargs):
        return self.model.apply(*args, **kwargs).replace(aux={"loss/extra": jnp.float32(0.75)})


def test_every_parameter_gets_a_finite_gradient(model, pairs):
    variables = jax.jit(model.init)(jax.random.key(0), pairs["query_tokens"])
    objective = objective_of(matryoshka_dims=(4, 16))
    grads = jax.jit(jax.grad(lambda v: objective(model, v, pairs, jax.random.key(1))[0]))(variables)
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(gradient).all() and gradient.any(), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_nested_training_makes_short_prefixes_useful(rng):
    """On a toy cipher, four coordinates find the document far better after nested than after plain training."""
    model = models.create("matryoshka", num_layers=1, d_model=32)
    cipher = rng.permutation(64) + 64

    def draw(batch_size):
        query = rng.integers(64, size=(batch_size, 4)).astype(np.int32)
        ones = np.ones_like(query)
        document = cipher[query].astype(np.int32)
        return {
            "query_tokens": query,
            "query_segment_ids": ones,
            "document_tokens": document,
            "document_segment_ids": ones,
        }

    def accuracy_at_4(dims):
        objective = objective_of(matryoshka_dims=dims)
        params = jax.jit(model.init)(
            jax.random.key(int(rng.integers(2**31))), draw(1)["query_tokens"]
        )
        optimizer = optax.adam(1e-2)

        @jax.jit
        def step(params, state, batch):
            grads = jax.grad(lambda p: objective(model, p, batch, jax.random.key(0))[0])(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(120):
            params, state = step(params, state, draw(64))
        _, metrics = evaluate(objective_of(matryoshka_dims=(4, 32)), model, params, draw(256))
        assert metrics["accuracy/32"] > 0.8
        return float(metrics["accuracy/4"])

    short, plain = accuracy_at_4((4, 32)), accuracy_at_4(None)
    print(f"accuracy with 4 coordinates: {short} nested, {plain} plain")
    assert short > plain + 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; valid: more than 0"),
        ({"matryoshka_dims": (4, 32)}, r"matryoshka_dims is \(4, 32\); valid: .*size 16"),
        ({"matryoshka_dims": (8, 4)}, r"matryoshka_dims is \(8, 4\); valid: .*increasing"),
        ({"matryoshka_dims": ()}, r"matryoshka_dims is \(\); valid: one or more"),
        ({"matryoshka_weights": (1.0,)}, r"matryoshka_weights is \(1.0,\); valid: None without"),
        (
            {"matryoshka_dims": (4, 16), "matryoshka_weights": (1.0,)},
            r"matryoshka_weights is \(1.0,\); valid: 2 numbers",
        ),
    ],
)
def test_bad_fields(model, pairs, fields, message):
    variables = jax.eval_shape(model.init, jax.random.key(0), pairs["query_tokens"])
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: objective_of(**fields)(model, v, pairs, None), variables)


def test_the_head_must_embed(pairs):
    model = models.create("matryoshka", num_layers=1, d_model=16, head="tied")
    variables = jax.eval_shape(model.init, jax.random.key(0), pairs["query_tokens"])
    with pytest.raises(ValueError, match=r"head is .*tied.*valid for contrastive: .*embeddings"):
        jax.eval_shape(lambda v: objective_of()(model, v, pairs, None), variables)
