import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.evaluation.pair_retrieval import embed_pairs, evaluate_retrieval, nested_dims
from effjax.models import Output

VOCAB, SIZE, LENGTH = 11, 6, 5


class TableEmbedder(nn.Module):
    """The embedding of a text is the sum of its tokens' rows of a table."""

    @nn.compact
    def __call__(self, tokens, *, positions=None, segment_ids=None, train=False):
        shape = (VOCAB, SIZE)
        table = self.param("table", nn.initializers.zeros_init(), shape, jnp.float32)
        summed = jnp.sum(table[tokens] * (segment_ids > 0)[..., None], axis=1)
        return Output(hidden=table[tokens], aux={}, metrics={}, embeddings=summed)


def embedder(variables, inputs):
    output = TableEmbedder().apply(variables, **inputs)
    return output.embeddings, output.metrics


def batch_of(pairs):
    batch = {}
    for i, side in enumerate(("query", "document")):
        tokens = np.full((len(pairs), LENGTH), VOCAB - 1, np.int32)
        segment_ids = np.zeros_like(tokens)
        for row, pair in enumerate(pairs):
            tokens[row, : len(pair[i])] = pair[i]
            segment_ids[row, : len(pair[i])] = 1
        batch |= {f"{side}_tokens": tokens, f"{side}_segment_ids": segment_ids}
    return batch


def test_texts_are_embedded_once_and_know_their_partners(rng):
    table = rng.normal(size=(VOCAB, SIZE)).astype(np.float32)
    pairs = [
        ([1, 2], [3]),
        ([4], [5, 6, 7]),
        ([1, 2], [8]),  # the first query again
        ([9], [3]),  # the first document again
        ([1, 2], [3]),  # the first pair again
        ([], [2]),  # no query
        ([], []),  # padding
    ]
    batches = [batch_of(pairs[:3]), batch_of(pairs[3:])]
    found = embed_pairs(embedder, {"params": {"table": table}}, batches)
    queries = [[1, 2], [4], [9]]
    documents = [[3], [5, 6, 7], [8]]
    np.testing.assert_allclose(found.queries, [table[q].sum(0) for q in queries], rtol=1e-5)
    np.testing.assert_allclose(found.documents, [table[d].sum(0) for d in documents], rtol=1e-5)
    assert found.relevant.tolist() == [[0, 2], [1, -1], [0, -1]]


def test_recall_of_embeddings_that_are_equal_is_perfect(rng):
    table = rng.normal(size=(VOCAB, SIZE)).astype(np.float32)
    pairs = [([a, b], [b, a]) for a in range(4) for b in range(a)]  # sums do not know the order
    found = embed_pairs(embedder, {"params": {"table": table}}, [batch_of(pairs)])
    rows = evaluate_retrieval(found, dims=(3, 6))
    assert {row["k"] for row in rows} == {1, 5}  # there are not 10 documents
    assert all(row["recall"] == 1.0 for row in rows)
    assert {row["dims"] for row in rows if row["method"] == "full"} == {(3,), (6,)}


def test_dimensions_are_those_trained_for_or_halvings():
    assert nested_dims(128, [8, 100]) == (8, 100)
    assert nested_dims(128) == (8, 16, 32, 64, 128)
    assert nested_dims(100) == (12, 25, 50, 100)
    assert nested_dims(5) == (5,)


def test_no_pair_is_an_error():
    with pytest.raises(ValueError, match="no pair"):
        embed_pairs(embedder, {"params": {"table": np.zeros((VOCAB, SIZE))}}, [])
