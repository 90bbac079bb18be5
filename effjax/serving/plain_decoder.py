"""The decoder for every model: each step takes all texts on by one token."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from effjax.models import DecodeState, SequenceModel
from effjax.serving import decoding
from effjax.serving.decoder import Decoder, Drawn, by_slot, read_together
from effjax.serving.decoding import Rows
from effjax.serving.inputs import NO_STOPS
from effjax.serving.pages import PAGE_SIZE, PagePool, paged
from effjax.serving.requests import Request
from effjax.serving.slots import batch_axes, put


class PlainDecoder(Decoder):
    """Texts by the programs of `effjax.serving.stream`, their caches in pages if so asked."""

    def __init__(
        self,
        model: SequenceModel,
        variables: Any,
        *,
        num_slots: int = 8,
        max_length: int | None = None,
        cache_tokens: int | None = None,
    ):
        """Makes room for the texts.

        Args:
          model: a model that generates (`effjax.serving.generate`).
          variables: its variables.
          num_slots: texts at a time.
          max_length: room of a text, prompt included; None: the model's `max_seq_len`.
          cache_tokens: room of all texts together, which they share in pages (`effjax.serving.pages`); a request waits
            until there are pages for its prompt and its `max_new_tokens`. None: each slot has room for `max_length`.

        Raises:
          ValueError: for a number that is not valid, or pages for a model that has no use for them.
        """
        if cache_tokens is not None and cache_tokens < 1:
            raise ValueError(f"cache_tokens={cache_tokens}; valid: at least 1, or None")
        # Where memory is short, it is not for the states of many prompts at once, each with room for `max_length`.
        together = read_together(num_slots) if cache_tokens is None else 1
        super().__init__((model,), num_slots, max_length, together)
        self._model = model
        self._variables = variables
        self._pool = None if cache_tokens is None else PagePool(cache_tokens)
        self._pages: dict[int, list[int]] = {}
        self._programs = decoding.programs(model)
        axes = batch_axes(self._model, self.max_length)
        self._put = jax.jit(functools.partial(_put, axes=axes), donate_argnums=0)
        self.reset()

    @property
    def room(self) -> int:
        """Most tokens that a text can ever have, prompt included."""
        return self.max_length if self._pool is None else min(self.max_length, self._pool.room)

    @property
    def free_cache_tokens(self) -> int | None:
        """Room in the memory that texts share; None if they do not."""
        return None if self._pool is None else self._pool.num_free * PAGE_SIZE

    def admit(self, slot: int, request: Request) -> bool:
        """As `Decoder.admit`; there is memory if there are enough pages."""
        if self._pool is not None:
            pages = self._pool.take(len(request.prompt) + request.max_new_tokens)
            if pages is None:
                return False
            self._pages[slot] = pages
        return super().admit(slot, request)

    def release(self, slot: int) -> None:
        """As `Decoder.release`; the pages are free too."""
        super().release(slot)
        if self._pool is not None:
            self._pool.give_back(self._pages.pop(slot))

    def reset(self) -> None:
        """As `Decoder.reset`."""
        # Compiled: no two arrays are one buffer, so that each can be given away.
        self._rows = jax.jit(self._empty)()

    def _read(self, slots: Sequence[int]) -> Mapping[int, Sequence[Drawn]]:
        tokens, lengths, keys, _, settings = self._requests.prompts(slots, self.max_length)
        new = self._programs.begin(
            self._variables, tokens, lengths, keys, settings, NO_STOPS, max_length=self.max_length
        )
        pages = None
        if self._pool is not None:
            table_row = self._pool.table_row
            pages = np.stack([table_row(self._pages[slot], self.max_length) for slot in slots])
        self._rows = self._put(self._rows, new, np.array(slots, np.int32), pages)
        return _newest(slots, new, np.ones(len(slots), bool))

    def _step(self) -> Mapping[int, Sequence[Drawn]]:
        # To a row that has stopped nothing happens, so that it writes to no page that is another's by now.
        stopped = jnp.asarray(~self._requests.is_read)
        rows = dataclasses.replace(self._rows, stopped=stopped)
        self._rows = self._programs.advance(
            self._variables, rows, self._requests.settings(), NO_STOPS
        )
        return _newest(range(self.num_slots), self._rows, self._requests.is_read)

    def _empty(self) -> Rows:
        none = functools.partial(jnp.zeros, (self.num_slots,))
        return Rows(
            state=self._empty_state(),
            token=none(jnp.int32),
            logprob=none(),
            count=none(jnp.int32),
            stopped=none(bool),
            keys=jax.random.split(jax.random.key(0), self.num_slots),
            seen=jnp.zeros((self.num_slots, self.vocab_size), bool),
        )

    def _empty_state(self) -> DecodeState:
        init = functools.partial(self._model.init_state, self.num_slots, self.max_length)
        if self._pool is None:
            return init()
        return paged(jax.eval_shape(init), self.max_length, self._pool.num_pages)


def _put(
    rows: Rows,
    new: Rows,
    places: Int[Array, " K"],
    pages: Int[Array, "K N"] | None,
    *,
    axes: Any,
) -> Rows:
    """The rows with K new ones in some places, in the pages that are theirs from now on."""
    state = put(rows.state, new.state, places, axes=axes, pages=pages)
    return decoding.map_rows(lambda old, values: old.at[places].set(values), state, rows, new)


def _newest(
    slots: Sequence[int], rows: Rows, is_new: Bool[np.ndarray, " K"]
) -> Mapping[int, Sequence[Drawn]]:
    """The newest token of each row that has one, the rows being those of some slots."""
    tokens, logprobs = jax.device_get((rows.token, rows.logprob))
    return by_slot(slots, tokens[:, None], logprobs[:, None], is_new.astype(int))
