import jax.numpy as jnp
import numpy as np
import pytest

from effjax.evaluation import retrieval


def unit_prefix(x, dim):
    x = np.asarray(x, np.float64)[:, :dim]
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ranked(queries, documents, dim, candidates=None):
    """Ids of the documents (of each query's candidates) by falling cosine, by brute force."""
    scores = unit_prefix(queries, dim) @ unit_prefix(documents, dim).T
    if candidates is None:
        return np.argsort(-scores, axis=1)
    order = np.argsort(-np.take_along_axis(scores, candidates, axis=1), axis=1)
    return np.take_along_axis(candidates, order, axis=1)


@pytest.fixture
def corpus(rng):
    """(queries [9, 12], documents [40, 12], the relevant document of each query [9])."""
    documents = rng.normal(size=(40, 12)).astype(np.float32)
    relevant = rng.choice(40, size=9, replace=False)
    noise = rng.normal(size=(9, 12)).astype(np.float32)
    return documents[relevant] + 0.7 * noise, documents, relevant


@pytest.mark.parametrize("chunk_size", [2, 9, 256])
@pytest.mark.parametrize("dim", [3, 12])
def test_full_search_is_brute_force(corpus, dim, chunk_size):
    queries, documents, _ = corpus
    scores, ids = retrieval.search(
        queries, documents, dims=(dim,), sizes=(7,), chunk_size=chunk_size
    )
    expected = ranked(queries, documents, dim)[:, :7]
    np.testing.assert_array_equal(ids, expected)
    cosines = unit_prefix(queries, dim) @ unit_prefix(documents, dim).T
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, expected, axis=1), rtol=1e-4)


def test_cascade_is_brute_force_stage_by_stage(corpus):
    queries, documents, _ = corpus
    _, ids = retrieval.search(queries, documents, dims=(2, 4, 12), sizes=(20, 9, 5))
    first = ranked(queries, documents, 2)[:, :20]
    second = ranked(queries, documents, 4, first)[:, :9]
    np.testing.assert_array_equal(ids, ranked(queries, documents, 12, second)[:, :5])


def test_shortlist_of_everything_is_full_search_even_with_ties(corpus):
    queries, documents, _ = corpus
    documents = np.concatenate([documents, documents])  # each document tied with its copy
    _, full = retrieval.search(queries, documents, dims=(12,), sizes=(10,))
    _, adaptive = retrieval.search(queries, documents, dims=(2, 12), sizes=(80, 10))
    np.testing.assert_array_equal(adaptive, full)


def test_recall_with_several_relevant_documents():
    found = np.array([[4, 2, 7], [1, 0, 3]])
    relevant = np.array([[7, 4, 9], [0, -1, -1]])
    assert retrieval.recall(found, relevant, (1, 2, 3)) == pytest.approx(
        {1: 1 / 6, 2: 2 / 3, 3: 5 / 6}
    )


def test_recall_at_k_by_dimension(corpus):
    queries, documents, relevant = corpus
    rows = retrieval.recall_at_k(queries, documents, relevant, dims=(2, 12), ks=(1, 5))
    assert [(r["dims"], r["k"], r["multiply_adds"]) for r in rows] == [
        ((2,), 1, 80),
        ((2,), 5, 80),
        ((12,), 1, 480),
        ((12,), 5, 480),
    ]
    for row in rows:
        top = ranked(queries, documents, row["dims"][0])[:, : row["k"]]
        expected = np.mean((top == relevant[:, None]).any(axis=1))
        assert row["method"] == "full" and row["recall"] == pytest.approx(expected)


def test_adaptive_retrieval_reranks_a_shortlist_and_counts_both_stages(corpus):
    queries, documents, relevant = corpus
    rows = retrieval.adaptive_retrieval(
        *corpus, shortlist_dim=3, shortlist_size=15, rerank_dim=12, ks=(1, 10)
    )
    found = ranked(queries, documents, 12, ranked(queries, documents, 3)[:, :15])
    for row in rows:
        expected = np.mean((found[:, : row["k"]] == relevant[:, None]).any(axis=1))
        assert row["recall"] == pytest.approx(expected)
        assert row["multiply_adds"] == 40 * 3 + 15 * 12
        assert row["method"] == "adaptive"


def test_funnel_halves_the_list_at_each_dimension(corpus):
    (row,) = retrieval.funnel_retrieval(*corpus, dims=(2, 4, 8, 12), shortlist_size=20, ks=(6,))
    assert row["sizes"] == (20, 10, 6, 6)
    assert row["multiply_adds"] == 40 * 2 + 20 * 4 + 10 * 8 + 6 * 12
    _, found = retrieval.search(*corpus[:2], dims=row["dims"], sizes=row["sizes"])
    hits = (np.asarray(found) == corpus[2][:, None]).any(axis=1)
    assert row["recall"] == pytest.approx(hits.mean())


def test_curve_has_every_setting_once(corpus):
    rows = retrieval.adaptive_curve(*corpus, dims=(2, 4, 12), shortlist_sizes=(8, 16), ks=(1, 5))
    settings = [(r["method"], r["dims"], r["sizes"], r["k"]) for r in rows]
    assert len(settings) == len(set(settings)) == 2 * (3 + 2 * (2 + 1))
    full = {r["k"]: r for r in rows if r["method"] == "full" and r["dims"] == (12,)}
    assert all(
        r["multiply_adds"] < full[r["k"]]["multiply_adds"] for r in rows if r not in full.values()
    )


def test_lengths_do_not_matter(rng, corpus):
    queries, documents, relevant = corpus
    scales = rng.uniform(0.1, 10.0, size=(40, 1)).astype(np.float32)
    rows = [
        retrieval.recall_at_k(queries, d, relevant, dims=(4, 12))
        for d in (documents, documents * scales)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": ()}, r"dims is \(\); valid"),
        ({"dims": (4, 2)}, r"dims is \(4, 2\); valid: .*increasing"),
        ({"dims": (2, 13)}, r"dims is \(2, 13\); valid: .*embedding size 12"),
        ({"sizes": (5,)}, r"sizes is \(5,\); valid: 2 counts"),
        ({"sizes": (5, 6)}, r"sizes is \(5, 6\); valid: .*never increasing"),
        ({"sizes": (41, 6)}, r"sizes is \(41, 6\); valid: .*from 40"),
        ({"sizes": (5, 0)}, r"sizes is \(5, 0\); valid: .*to 1"),
        ({"chunk_size": 0}, "chunk_size is 0; valid: 1 or more"),
        ({"queries": jnp.ones((3, 5))}, r"queries are \(3, 5\) and documents \(40, 12\); valid"),
    ],
)
def test_bad_search(corpus, fields, message):
    queries, documents, _ = corpus
    given = {"queries": queries, "documents": documents, "dims": (2, 12), "sizes": (9, 5)} | fields
    with pytest.raises(ValueError, match=message):
        retrieval.search(given.pop("queries"), given.pop("documents"), **given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortlist_size": 4}, r"shortlist_size is 4; valid: from 5 \(the largest k\) to 40"),
        ({"shortlist_size": 41}, r"shortlist_size is 41; valid: from 5"),
        (
            {"shortlist_dim": 12},
            r"\(shortlist_dim, rerank_dim\) is \(12, 12\); valid: .*increasing",
        ),
        ({"rerank_dim": 13}, r"\(shortlist_dim, rerank_dim\) is \(2, 13\); valid"),
        ({"ks": ()}, r"ks is \(\); valid: one or more cut-offs from 1 to 40"),
        ({"ks": (0, 5)}, r"ks is \(0, 5\); valid: one or more cut-offs"),
        ({"relevant": np.full(9, 40)}, "relevant has 40; valid: ids below .* 40"),
        ({"relevant": np.full(9, -1)}, r"relevant\[0\] is \[-1\]; valid: one or more ids"),
        ({"relevant": np.zeros(8, int)}, r"relevant is \(8, 1\); valid: \[9\]"),
    ],
)
def test_bad_measurement(corpus, fields, message):
    queries, documents, relevant = corpus
    setting = {"shortlist_dim": 2, "shortlist_size": 9, "rerank_dim": 12, "ks": (1, 5)}
    given = {"relevant": relevant, **setting} | fields
    with pytest.raises(ValueError, match=message):
        retrieval.adaptive_retrieval(queries, documents, given.pop("relevant"), **given)
