import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models, registry

DIMS = (4, 16)


def model_of(**head):
    head = {"name": "matryoshka_classifier", "num_classes": 3, "dims": DIMS} | head
    return models.create("matryoshka", num_layers=1, d_model=16, head=head)


@pytest.fixture
def batch(rng):
    lengths = np.array([7, 3, 5, 0])  # the last row only fills the batch
    return {
        "tokens": jnp.asarray(rng.integers(256, size=(4, 7)), jnp.int32),
        "segment_ids": jnp.asarray(np.arange(7) < lengths[:, None], jnp.int32),
        "labels": jnp.asarray(rng.integers(3, size=4), jnp.int32),
    }


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("weights", [None, (0.25, 2.0)])
def test_loss_is_the_weighted_sum_of_cross_entropies(batch, tie_weights, weights):
    model = model_of(tie_weights=tie_weights)
    variables = jax.jit(model.init)(jax.random.key(0), batch["tokens"])
    objective = registry.build(
        "objective", {"name": "classification", "matryoshka_weights": weights}
    )
    loss, metrics = jax.jit(lambda v: objective(model, v, batch, None))(variables)
    out = jax.jit(model.apply)(variables, batch["tokens"], segment_ids=batch["segment_ids"])
    labels, expected = np.asarray(batch["labels"])[:3], 0.0
    for m, importance in zip(DIMS, weights or (1.0, 1.0), strict=True):
        logits = np.asarray(out.class_logits[m], np.float64)[:3]
        nats = -log_softmax(logits)[np.arange(3), labels].mean()
        np.testing.assert_allclose(metrics[f"cross_entropy/{m}"], nats, rtol=1e-5)
        correct = (logits.argmax(axis=-1) == labels).mean()
        np.testing.assert_allclose(metrics[f"accuracy/{m}"], correct, rtol=1e-6)
        expected += importance * nats
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["weight"] == 3.0


@pytest.mark.parametrize("tie_weights", [False, True])
def test_every_parameter_gets_a_finite_gradient(batch, tie_weights):
    model = model_of(tie_weights=tie_weights)
    variables = jax.jit(model.init)(jax.random.key(0), batch["tokens"])
    objective = registry.build("objective", "classification")
    grads = jax.jit(jax.grad(lambda v: objective(model, v, batch, jax.random.key(1))[0]))(variables)
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(gradient).all() and gradient.any(), jax.tree_util.keystr(path)


def test_the_head_must_classify(batch):
    model = models.create("matryoshka", num_layers=1, d_model=16)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch["tokens"])
    objective = registry.build("objective", "classification")
    with pytest.raises(
        ValueError, match=r"head is .*embedding.*valid for classification: .*class scores"
    ):
        jax.eval_shape(lambda v: objective(model, v, batch, None), variables)


def test_weights_must_fit_the_dimensions_of_the_head(batch):
    model = model_of()
    variables = jax.eval_shape(model.init, jax.random.key(0), batch["tokens"])
    objective = registry.build(
        "objective", {"name": "classification", "matryoshka_weights": (1.0,)}
    )
    with pytest.raises(ValueError, match=r"matryoshka_weights is \(1.0,\); valid: 2 numbers"):
        jax.eval_shape(lambda v: objective(model, v, batch, None), variables)
