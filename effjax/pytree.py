"""Parameter leaves by path.

A path is the keys from the root joined by slashes, `depth/layers/blocks_0/mixer/query/kernel`. Patterns are regular
expressions that must match the end of a path at a key boundary: `query/kernel`, `(gate|up)/kernel`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def path_of(key_path: tuple) -> str:
    """The slash-joined form of a JAX key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` matches the end of `path`, starting at a key."""
    return re.search(rf"(^|/)({pattern})$", path) is not None


def map_paths(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`function(path, leaf, ...)` on every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, *leaves: function(path_of(key_path), *leaves), tree, *rest
    )


def paths(tree: Any) -> list[str]:
    """The paths of all leaves, in tree order."""
    return [path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def select(tree: Any, pattern: str) -> dict[str, Any]:
    """The leaves whose path matches, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(k): leaf for k, leaf in leaves if matches(pattern, path_of(k))}


def count(tree: Any, pattern: str = ".*") -> int:
    """Number of scalars in the leaves whose path matches."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in select(tree, pattern).values())
