"""A batch whose rows change hands: where one text has ended, another takes its place while the others go on.

Continuous batching (Yu et al., 2022, "Orca", OSDI). A batch has a fixed number of slots, so that one compiled step
serves whatever texts are in them; a new text is read by itself and then put into a slot.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax.mixers import PagedKVState
from effjax.models import DecodeState, SequenceModel
from effjax.serving import decoding
from effjax.serving.decoding import Rows
from effjax.serving.pages import PagePool, paged, put_in_pages
from effjax.serving.prompts import pad
from effjax.serving.sampling import Sampling, Settings

# A value of each setting that changes nothing, for rows that do not use what another row of the batch uses.
_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}

# Settings that a step is compiled for: filters sort the vocabulary, which most batches can do without.
_PROGRAMS = ((), ("temperature",), ("min_p", "repetition_penalty", "temperature", "top_k", "top_p"))


class Slots:
    """The compiled programs of a batch of texts in the making.

    Attributes:
      model: the model as it is served (`decoding.served`).
      num_slots: texts at a time.
      max_length: tokens of a text, prompt included.
      pool: pages of the caches; None: each slot has room for `max_length` tokens.
    """

    def __init__(
        self,
        model: SequenceModel,
        num_slots: int,
        max_length: int,
        cache_tokens: int | None = None,
    ):
        """Compiles nothing yet.

        Args:
          model: a model that generates.
          num_slots: texts at a time.
          max_length: room of a text, prompt included.
          cache_tokens: room of all texts together, in pages; None: that of `num_slots` of the longest texts.

        Raises:
          ValueError: for a number that is not valid, or pages for a model that has no use for them.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots}; valid: at least 1")
        if cache_tokens is not None and cache_tokens < 1:
            raise ValueError(f"cache_tokens={cache_tokens}; valid: at least 1, or None")
        self.model = decoding.served(model)
        self.num_slots = num_slots
        self.max_length = max_length
        self.pool = None if cache_tokens is None else PagePool(cache_tokens)
        self._axes = batch_axes(self.model, max_length)
        nothing_stops = jnp.zeros((0,), jnp.int32)  # the engine compares tokens itself
        self._read = jax.jit(
            functools.partial(
                decoding.begin, self.model, stop_tokens=nothing_stops, max_length=max_length
            )
        )
        self._step = jax.jit(
            functools.partial(decoding.advance, self.model, stop_tokens=nothing_stops),
            donate_argnums=1,
        )
        self._put = jax.jit(functools.partial(put, axes=self._axes), donate_argnums=0)

    def empty(self) -> Rows:
        """Slots without a text."""
        # Compiled: no two arrays are one buffer, so that each can be given away.
        return jax.jit(self._empty)()

    def _empty(self) -> Rows:
        num, vocab_size = self.num_slots, self.model.vocab_size
        return Rows(
            state=self._empty_state(),
            token=jnp.zeros((num,), jnp.int32),
            logprob=jnp.zeros((num,)),
            count=jnp.zeros((num,), jnp.int32),
            stopped=jnp.ones((num,), bool),
            keys=jax.random.split(jax.random.key(0), num),
            seen=jnp.zeros((num, vocab_size), bool),
        )

    def _empty_state(self) -> DecodeState:
        init = functools.partial(self.model.init_state, self.num_slots, self.max_length)
        if self.pool is None:
            return init()
        return paged(jax.eval_shape(init), self.max_length, self.pool.num_pages)

    def read(
        self, variables: Any, prompt: Int[np.ndarray, " n"], sampling: Sampling, key: Array
    ) -> Rows:
        """One row: a text with its first token. Prompts are padded, so that there are few programs."""
        padded, lengths = pad([prompt], self.max_length)
        settings = self.settings([sampling], _PROGRAMS[-1])
        return self._read(variables, padded, lengths, key[None], settings)

    def put(self, rows: Rows, one: Rows, slot: int, pages: Sequence[int] = ()) -> Rows:
        """The rows with that one in a slot, in place; `pages` of the pool are its own from now on."""
        table_row = None if self.pool is None else self.pool.table_row(pages, self.max_length)
        return self._put(rows, one, jnp.int32(slot), table_row)

    def step(self, variables: Any, rows: Rows, samplings: list[Sampling | None]) -> Rows:
        """The rows with one more token each, in place; None marks a slot without a text, which nothing happens to."""
        used = {name for s in samplings if s is not None for name in s.settings()}
        names = next(names for names in _PROGRAMS if used <= set(names))
        stopped = jnp.asarray([sampling is None for sampling in samplings])
        settings = self.settings(samplings, names)
        return self._step(variables, rows.replace(stopped=stopped), settings)

    def settings(self, samplings: list[Sampling | None], names: Iterable[str]) -> Settings:
        """Each of the named settings as an array of one number a row."""
        given = [{} if sampling is None else sampling.settings() for sampling in samplings]
        neutral = {**_NEUTRAL, "top_k": float(self.model.vocab_size)}
        return {
            name: np.array([row.get(name, neutral[name]) for row in given], np.float32)
            for name in names
        }


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


def put(
    rows: Rows, one: Rows, slot: Int[Array, ""], pages: Int[Array, " N"] | None, *, axes: Any
) -> Rows:
    """`rows` with the only row of `one` in a slot.

    Args:
      rows: B rows.
      one: 1 row of the same model and room.
      slot: from 0 to B - 1.
      pages: row of the slot in the page tables, if the caches of `rows` are in pages.
      axes: see `batch_axes`.
    """

    def write(all_rows, row, axis=0):
        if isinstance(all_rows, PagedKVState):
            return put_in_pages(all_rows, row, slot, pages)
        return jax.lax.dynamic_update_slice_in_dim(all_rows, row, slot, axis)

    is_paged = lambda part: isinstance(part, PagedKVState)  # noqa: E731
    state = jax.tree.map(write, rows.state, one.state, axes, is_leaf=is_paged)
    rest = jax.tree.map(write, rows.replace(state=None), one.replace(state=None))
    return rest.replace(state=state)
