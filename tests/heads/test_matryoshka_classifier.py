import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.heads import MatryoshkaClassifier, truncate
from effjax.objectives.classification import cross_entropy
from effjax.objectives.matryoshka import nested

DIMS = (2, 3, 7)


def classify(head, params, z):
    """Class scores of texts of one token each, whose embedding is the state of that token."""
    arguments = {"embedding": jnp.zeros((1, 1)), "segment_ids": jnp.ones((len(z), 1), jnp.int32)}
    return head.apply({"params": params}, jnp.asarray(z)[:, None], **arguments)["class_logits"]


def init(head, size):
    arguments = {"embedding": jnp.zeros((1, 1)), "segment_ids": jnp.ones((1, 1), jnp.int32)}
    return head.init(jax.random.key(0), jnp.zeros((1, 1, size)), **arguments)["params"]


@pytest.mark.parametrize("dim", [1, 3, 7])
def test_truncate_gives_unit_prefixes(rng, dim):
    z = rng.normal(size=(2, 4, 7))
    expected = z[..., :dim] / np.linalg.norm(z[..., :dim], axis=-1, keepdims=True)
    np.testing.assert_allclose(truncate(jnp.float32(z), dim), expected, rtol=1e-5)


def test_truncate_of_nothing_is_nothing_and_has_a_gradient():
    assert not truncate(jnp.zeros((1, 4)), 3).any()
    assert jnp.isfinite(jax.grad(lambda z: truncate(z, 3).sum())(jnp.zeros((1, 4)))).all()


@pytest.mark.parametrize("dim", [0, -1, 8])
def test_truncate_checks_the_dimension(dim):
    with pytest.raises(ValueError, match=f"dim is {dim}; valid: 1 to the embedding size 7"):
        truncate(jnp.zeros((1, 7)), dim)


@pytest.mark.parametrize("use_bias", [False, True])
def test_separate_classifiers_read_prefixes(rng, use_bias):
    head = MatryoshkaClassifier(num_classes=4, dims=DIMS, use_bias=use_bias)
    z = rng.normal(size=(5, 9))
    weights = {m: (rng.normal(size=(m, 4)), rng.normal(size=4) * use_bias) for m in DIMS}
    params = {
        f"classifier_{m}": {"kernel": jnp.float32(w)}
        | ({"bias": jnp.float32(b)} if use_bias else {})
        for m, (w, b) in weights.items()
    }
    assert jax.tree.map(jnp.shape, init(head, 9)) == jax.tree.map(jnp.shape, params)
    logits = classify(head, params, jnp.float32(z))
    assert tuple(logits) == DIMS
    for m, (w, b) in weights.items():
        np.testing.assert_allclose(logits[m], z[:, :m] @ w + b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_tied_classifiers_are_slices_of_one_matrix(rng, use_bias):
    head = MatryoshkaClassifier(num_classes=4, dims=DIMS, tie_weights=True, use_bias=use_bias)
    z, w, b = rng.normal(size=(5, 9)), rng.normal(size=(7, 4)), rng.normal(size=4)
    bias = {"bias": jnp.float32(b)} if use_bias else {}
    params = {"classifier": {"kernel": jnp.float32(w), **bias}}
    assert jax.tree.map(jnp.shape, init(head, 9)) == jax.tree.map(jnp.shape, params)
    logits = classify(head, params, jnp.float32(z))
    for m in DIMS:
        expected = z[:, :m] @ w[:m] + b * use_bias
        np.testing.assert_allclose(logits[m], expected, rtol=1e-4, atol=1e-5)


def test_tied_gradient_adds_up_over_the_slices(rng):
    """Row r of W is in the scores of every dimension above r: d(sum of scores)/dW[r] counts them."""
    head = MatryoshkaClassifier(num_classes=3, dims=DIMS, tie_weights=True)
    z = rng.normal(size=(5, 7))

    def total(params):
        return sum(jnp.sum(scores) for scores in classify(head, params, jnp.float32(z)).values())

    gradient = jax.grad(total)(init(head, 7))["classifier"]
    uses = np.array([sum(r < m for m in DIMS) for r in range(7)])
    expected = (z.sum(axis=0) * uses)[:, None].repeat(3, axis=1)
    np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient["bias"], np.full(3, 5.0 * len(DIMS)), rtol=1e-6)


@pytest.mark.parametrize("variant", ["separate", "tied"])
def test_against_the_authors_code(variant):
    """Scores, losses and gradient as recorded by tests/fixtures/record_mrl.py, in float64."""
    recorded = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "mrl.npz")
    of = {k.removeprefix(f"{variant}/"): recorded[k] for k in recorded if k.startswith(variant)}
    dims, importances = tuple(recorded["dims"].tolist()), tuple(recorded["importances"].tolist())
    head = MatryoshkaClassifier(num_classes=5, dims=dims, tie_weights=variant == "tied")
    names = ["classifier"] if variant == "tied" else [f"classifier_{m}" for m in dims]
    with jax.enable_x64(True):
        params = {
            name: {
                "kernel": jnp.asarray(of[f"nesting_classifier_{i}.weight"].T),
                "bias": jnp.asarray(of[f"nesting_classifier_{i}.bias"]),
            }
            for i, name in enumerate(names)
        }
        valid = jnp.ones(len(of["labels"]), bool)

        def loss(z, weights):
            logits = classify(head, params, z)
            return nested(lambda m: cross_entropy(logits[m], of["labels"], valid), dims, weights)[0]

        z = jnp.asarray(of["embeddings"])
        logits = jnp.stack(list(classify(head, params, z).values()))
        # The pooled embedding is float32 by contract, hence not closer than that.
        np.testing.assert_allclose(logits, of["logits"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loss(z, None), of["loss"], rtol=1e-6)
        np.testing.assert_allclose(loss(z, importances), of["weighted_loss"], rtol=1e-6)
        gradient = jax.grad(loss)(z, importances)
        np.testing.assert_allclose(gradient, of["gradient"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1; valid: 2 or more"),
        ({"dims": ()}, r"dims is \(\); valid: one or more increasing positive integers"),
        ({"dims": (4, 2)}, r"dims is \(4, 2\); valid"),
        ({"dims": (2, 2)}, r"dims is \(2, 2\); valid"),
        ({"dims": (0, 2)}, r"dims is \(0, 2\); valid"),
        ({"dims": (2, 9)}, r"dims is \(2, 9\); valid: .*at most the embedding size 7"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        init(MatryoshkaClassifier(**{"num_classes": 3, "dims": DIMS} | fields), 7)
