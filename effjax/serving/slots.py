"""A batch whose rows change hands: where one text has ended, another takes its place while the others go on."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Int

from effjax.mixers import PagedKVState
from effjax.models import SequenceModel
from effjax.serving.pages import put_in_pages


def batch_axes(model: SequenceModel, max_length: int) -> Any:
    """For each array of the decode state, which of its axes is that of the rows."""
    two, three = (
        jax.eval_shape(functools.partial(model.init_state, rows, max_length)) for rows in (2, 3)
    )

    def differs(a, b):
        (axis,) = (
            i for i, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if len(set(sizes)) > 1
        )
        return axis

    return jax.tree.map(differs, two, three)


def put[Batch](
    batch: Batch,
    new: Batch,
    rows: Int[Array, " K"],
    *,
    axes: Any,
    pages: Int[Array, "K N"] | None = None,
) -> Batch:
    """Arrays of B rows with K of them replaced by those of a smaller batch.

    Args:
      batch: a pytree of arrays.
      new: the same of K rows and as much room.
      rows: from 0 to B - 1.
      axes: for each array, which of its axes is that of the rows.
      pages: those of each of the rows in the page tables, if caches of `batch` are in pages.
    """

    def write(old, values, axis):
        if pages is not None and isinstance(old, PagedKVState):
            return put_in_pages(old, values, rows, pages)
        return old.at[(slice(None),) * axis + (rows,)].set(values)

    is_paged = lambda part: isinstance(part, PagedKVState)  # noqa: E731
    return jax.tree.map(write, batch, new, axes, is_leaf=is_paged)
