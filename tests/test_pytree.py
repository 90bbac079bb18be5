import jax.numpy as jnp

from effjax import pytree

TREE = {"a": {"query": {"kernel": jnp.ones((2, 3))}}, "b": [jnp.ones(4), jnp.zeros(())]}


def test_paths_are_slash_joined_keys():
    assert pytree.paths(TREE) == ["a/query/kernel", "b/0", "b/1"]


def test_patterns_match_whole_keys_at_the_end():
    assert pytree.matches("query/kernel", "a/query/kernel")
    assert pytree.matches("(key|query)/kernel", "query/kernel")
    assert not pytree.matches("query/kernel", "a/subquery/kernel")
    assert not pytree.matches("query", "a/query/kernel")


def test_select_and_count():
    assert list(pytree.select(TREE, r"b/\d")) == ["b/0", "b/1"]
    assert pytree.count(TREE) == 11
    assert pytree.count(TREE, "kernel") == 6


def test_map_paths_keeps_the_structure():
    assert pytree.map_paths(lambda path, leaf: path, TREE) == {
        "a": {"query": {"kernel": "a/query/kernel"}},
        "b": ["b/0", "b/1"],
    }
