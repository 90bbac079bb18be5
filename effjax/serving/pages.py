"""Memory of texts in the making, in pages: who has which, and decode states whose caches lie in them.

With room for the longest text in every slot, most of a server's memory holds nothing. Here a text takes as many pages
of each cache as it may need when it gets its slot, and gives them back at its end (Kwon et al., 2023, "PagedAttention",
arXiv 2309.06180).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax.mixers import KVState, PagedKVState

PAGE_SIZE = 16


class PagePool:
    """Which pages are free.

    Attributes:
      num_pages: of the pool.
      num_free: of them, how many nobody has.
      room: tokens that all of them hold.
    """

    def __init__(self, num_tokens: int):
        """Room for that many tokens, in whole pages."""
        self.num_pages = -(-num_tokens // PAGE_SIZE)
        self._free = list(range(self.num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def room(self) -> int:
        return self.num_pages * PAGE_SIZE

    def take(self, num_tokens: int) -> list[int] | None:
        """Pages for that many tokens; None, and none are taken, if there are not enough."""
        count = -(-num_tokens // PAGE_SIZE)
        if count > len(self._free):
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Pages that nobody reads any more."""
        self._free += pages

    def table_row(self, pages: Sequence[int], max_length: int) -> Int[np.ndarray, " N"]:
        """Pages as the row of a page table, for a text of up to `max_length` tokens."""
        row = np.full(-(-max_length // PAGE_SIZE), self.num_pages, np.int32)
        row[: len(pages)] = pages
        return row


def paged(state: Any, max_length: int, num_pages: int) -> Any:
    """An empty decode state with the caches of whole texts in pages; rings and constant states stay as they are.

    Args:
      state: shapes of a decode state, as `jax.eval_shape` gives them.
      max_length: tokens that its rows have room for.
      num_pages: pages of each cache.

    Raises:
      ValueError: if there is no cache of whole texts.
    """
    pages_of_row = -(-max_length // PAGE_SIZE)

    if not any(_is_whole(p, max_length) for p in jax.tree.leaves(state, is_leaf=_is_cache)):
        raise ValueError(
            "cache_tokens is given, and the model has no cache of whole texts; valid: None for such a model"
        )

    def empty(part):
        if not _is_whole(part, max_length):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part)
        *repeats, rows, _, num_heads, head_dim = part.k.shape
        pages = jnp.zeros((*repeats, num_pages, PAGE_SIZE, num_heads, head_dim), part.k.dtype)
        return PagedKVState(
            k=pages,
            v=pages,
            page_table=jnp.full((*repeats, rows, pages_of_row), num_pages, jnp.int32),
            length=jnp.zeros((*repeats, rows), jnp.int32),
        )

    return jax.tree.map(empty, state, is_leaf=_is_cache)


def put_in_pages(
    cache: PagedKVState, new: KVState, rows: Int[Array, " K"], pages: Int[Array, "K N"]
) -> PagedKVState:
    """The cache with the K rows of `new` in some of its rows.

    Args:
      cache: of B rows, of up to N pages each.
      new: a cache that has room for as many tokens a row.
      rows: from 0 to B - 1.
      pages: those of the rows from now on, then `num_pages`.
    """
    if cache.k.ndim > 4:  # a leading axis of scanned layers
        return jax.vmap(put_in_pages, in_axes=(0, 0, None, None))(cache, new, rows, pages)

    def write(old, fresh):
        room = pages.shape[1] * PAGE_SIZE - fresh.shape[1]
        in_pages = jnp.pad(fresh, ((0, 0), (0, room), (0, 0), (0, 0)))
        in_pages = in_pages.reshape(-1, PAGE_SIZE, *fresh.shape[2:])
        return old.at[pages.reshape(-1)].set(in_pages, mode="drop")

    return dataclasses.replace(
        cache,
        k=write(cache.k, new.k),
        v=write(cache.v, new.v),
        page_table=cache.page_table.at[rows].set(pages),
        length=cache.length.at[rows].set(new.length),
    )


def _is_cache(part: Any) -> bool:
    return isinstance(part, KVState)


def _is_whole(part: Any, max_length: int) -> bool:
    """Whether it is a cache that keeps every token; with a leading axis if its layers are scanned."""
    return _is_cache(part) and part.k.shape[-3] == max_length
